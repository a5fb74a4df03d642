"""Writes a shard, a tar in WebDataset's layout, with its index for DALI: whole or not at all, always the same bits."""

import io
import os
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path

from pera_fast.data.decoding.tar import BLOCK

_PART = ".part"
_OURS = re.compile(r"shard-\d{6,}\.(tar|idx)|\.shard-\d{6,}\.(tar|idx)\.part")


def shard_name(number: int) -> str:
    """shard-000000.tar, ..."""
    return f"shard-{number:06d}.tar"


def index_name(shard: str) -> str:
    """Name of a shard's index, as DALI's wds2idx chooses it."""
    return shard.removesuffix(".tar") + ".idx"


def remove_others(folder: Path, shards: set[str]) -> None:
    """Removes what a killed process left: parts, and shards that are not among `shards`."""
    keep = shards | {index_name(shard) for shard in shards}
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in keep:
            path.unlink(missing_ok=True)


class ShardWriter:
    """Collects samples; `finish` gives the files their names.

    The index is the text format v1.2 of DALI's webdataset reader: a sample a line, its members as extension, offset,
    size and name. It splits at blanks, so keys and extensions must hold none.

    Args:
        folder: where the shard goes.
        number: counts the shards.
    """

    def __init__(self, folder: Path, number: int):
        self.name = shard_name(number)
        self.samples = 0
        self._folder = folder
        self._lines: list[str] = []
        self._file = open(self._part(self.name), "wb")  # noqa: SIM115 - closed by finish and discard
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def size_with(self, members: Mapping[str, bytes]) -> int:
        """Bytes of the tar if it ended after these members."""
        new = sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for data in members.values())
        return -(-(self._tar.offset + new + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Appends a sample: its members by extension. Raises OSError."""
        words = []
        for extension, data in members.items():
            member = tarfile.TarInfo(f"{key}.{extension}")  # time 0, owner 0: nothing of the machine
            member.size = len(data)
            words.append(f"{extension} {self._tar.offset + BLOCK} {len(data)} {member.name}")
            self._tar.addfile(member, io.BytesIO(data))
        self._lines.append(" ".join(words))
        self.samples += 1

    def finish(self) -> int:
        """Makes the shard appear; returns its bytes. Raises OSError."""
        self._tar.close()
        size = self._file.tell()
        _sync(self._file)
        self._file.close()
        index = index_name(self.name)
        with open(self._part(index), "w", encoding="ascii") as file:
            file.write("\n".join([f"v1.2 {self.samples}", *self._lines]) + "\n")
            _sync(file)
        os.replace(self._part(index), self._folder / index)  # first: no shard is ever without its index
        os.replace(self._part(self.name), self._folder / self.name)
        return size

    def discard(self) -> None:
        """Removes what was written; nothing after `finish`."""
        self._file.close()
        for name in (self.name, index_name(self.name)):
            self._part(name).unlink(missing_ok=True)

    def _part(self, name: str) -> Path:
        return self._folder / f".{name}{_PART}"


def _sync(file: io.IOBase) -> None:
    file.flush()
    os.fsync(file.fileno())
