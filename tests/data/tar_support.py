"""Tars to test with: as the webdataset tools write them, and worse."""

import io
import tarfile
from pathlib import Path

from data_support import encoded, scene
from PIL import Image


def png(key: int, height: int = 48, width: int = 64) -> bytes:
    return encoded(Image.fromarray(scene(key, height, width)), "PNG")


def write_tar(path: Path, members: dict[str, bytes], **options) -> Path:
    """A tar of regular files with these names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            add(tar, name, data)
    return path


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **attributes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for attribute, value in attributes.items():
        setattr(member, attribute, value)
    tar.addfile(member, io.BytesIO(data))


def write_shards(folder: Path, shards: int, each: int) -> Path:
    """shard-0.tar, ...: `each` samples of a PNG and a JSON in each, with keys that count through."""
    for shard in range(shards):
        members = {}
        for number in range(shard * each, (shard + 1) * each):
            members[f"{number:03d}.png"] = png(number)
            members[f"{number:03d}.json"] = b"{}"
        write_tar(folder / f"shard-{shard}.tar", members)
    return folder
