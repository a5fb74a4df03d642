"""Seeded mutations of image and tar files: what a bad disk, a broken download or a hostile sender makes of them."""

import io
import tarfile

import numpy as np
from data_support import encoded, raster, scene
from PIL import Image

_ODD_VALUES = (0, 1, 0x7F, 0x80, 0xFF)
_ODD_WORDS = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\x80\0\0\0")
_TAR_BLOCK = 512


def seeds() -> dict[str, bytes]:
    """Small valid files by suffix and kind."""
    picture = Image.fromarray(scene(1, 40, 56))
    planes = np.moveaxis(scene(2, 40, 56), -1, 0)
    tiled = {"tiled": True, "blockxsize": 16, "blockysize": 16}
    return {
        "baseline.jpg": encoded(picture, "JPEG", quality=80),
        "progressive.jpg": encoded(picture, "JPEG", progressive=True),
        "restarts.jpg": encoded(picture.convert("L"), "JPEG", restart_marker_rows=1),
        "rgb.png": encoded(picture, "PNG"),
        "palette.png": encoded(picture.convert("P"), "PNG"),
        "deep.png": encoded(Image.fromarray(scene(2)[..., 0].astype(np.uint16) * 257), "PNG"),
        "plain.tif": encoded(picture, "TIFF"),
        "lzw.tif": encoded(picture, "TIFF", compression="tiff_lzw"),
        "deflate.tif": raster(planes.astype(np.uint16) * 257, compress="deflate", **tiled),
        "planar.tif": raster(planes.astype(np.float32), interleave="band"),
    }


def seed_tar() -> bytes:
    """A tar of five small images, with a long name and a folder."""
    buffer = io.BytesIO()
    picture = encoded(Image.fromarray(scene(3, 24, 24)), "JPEG")
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.jpg", "b/c.png", "long/" * 30 + "d.jpg", "é.tif", "e.json", "f.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(picture)
            tar.addfile(member, io.BytesIO(picture))
    return buffer.getvalue()


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """The file with one to several things done to it."""
    found = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        if not found:
            break
        at = int(rng.integers(len(found)))
        if rng.random() < 0.5:
            at = min(at, int(rng.integers(min(len(found), 400))))  # headers matter more
        kind = int(rng.integers(8))
        if kind == 0:
            found[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            found[at] = int(rng.choice(_ODD_VALUES))
        elif kind == 2:
            word = _ODD_WORDS[int(rng.integers(len(_ODD_WORDS)))]
            found[at : at + 4] = word[: len(found) - at]
        elif kind == 3:
            del found[at:]
        elif kind == 4:
            del found[at : at + int(rng.integers(1, 64))]
        elif kind == 5:
            found[at:at] = rng.bytes(int(rng.integers(1, 64)))
        elif kind == 6:
            start = int(rng.integers(len(found)))
            found[at:at] = found[start : start + int(rng.integers(1, 200))]
        else:
            end = min(len(found), at + int(rng.integers(1, 200)))
            found[at:end] = rng.bytes(end - at)
    return bytes(found)


def mutate_tar(data: bytes, rng: np.random.Generator) -> bytes:
    """As `mutate`; in every other case with checksums that hold, so that the damage is believed."""
    found = bytearray(mutate(data, rng))
    if rng.random() < 0.5:
        for start in range(0, len(found) - _TAR_BLOCK + 1, _TAR_BLOCK):
            block = found[start : start + _TAR_BLOCK]
            if block[257:262] == b"ustar":
                block[148:156] = b" " * 8
                found[start + 148 : start + 156] = b"%06o\0 " % sum(block)
    return bytes(found)
