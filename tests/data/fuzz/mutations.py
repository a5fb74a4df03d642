"""Seeded mutations of files, texts and structures: what a bad disk, a slip or a hostile sender makes of them."""

import io
import re
import tarfile
from collections.abc import Callable
from typing import Any

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


def mutate(data: bytes, rng: np.random.Generator, most: int = 5) -> bytes:
    """The file with one to several things done to it."""
    found = bytearray(data)
    for _ in range(int(rng.integers(1, most + 1))):
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


_WORDS = (
    "null", "~", ".nan", ".inf", "-.inf", "1e999", "-1", "0", "9" * 30, "9" * 400, "9" * 5000, "1e-400", "0x10",
    "1_000", "true", "[]", "{}", "[[[[", "]]", "[1, [2]]", "{a: 1}", "*a", "&a", "&a [*a]", "!!python/object:os.system",
    "!!binary x", "<<: *a", "${x}", "${oc.env:HOME}", "${train.steps}", "???", "\0", "\t", "\r\n", "\x85", "\ufeff",
    "\ud7ff", "é",
    "'", '"', "\\", "# ", ": ", "- ", "---\n", "...\n", "|", ">", "%", "@", "`", "[" * 2000, "{a: " * 500, "- " * 1500,
    "=", "2024-01-01", "12:30:45", "yes", "on", "\n", "\n  ", " ", "\"\\u0000\"", "1.", ".5", "+1", "NaN", "Infinity",
)  # fmt: skip


def mutate_text(text: str, rng: np.random.Generator) -> bytes:
    """Text with words in it that mean something in YAML or JSON; now and then bytes that are no text."""
    for _ in range(int(rng.integers(1, 4))):
        words = re.split(r"(\s+|[=:,\[\]{}\"])", text)
        at, kind = int(rng.integers(len(words))), int(rng.integers(5))
        word = _WORDS[int(rng.integers(len(_WORDS)))]
        if kind == 0:
            words[at] = word
        elif kind == 1:
            words.insert(at, word)
        elif kind == 2:
            del words[at]
        elif kind == 3:
            words[at] = words[int(rng.integers(len(words)))]
        else:
            lines = text.splitlines(keepends=True) or [""]
            one, other = (int(number) for number in rng.integers(len(lines), size=2))
            lines.insert(one, lines[other])
            words = lines
        text = "".join(words)
    data = text.encode("utf-8", "surrogatepass")
    return mutate(data, rng) if rng.random() < 0.2 else data


_ODD = (
    None, True, -1, 0, 1, 2**31, 2**63, -(2**70), 1.5, float("nan"), float("inf"), "", "x", "\n", b"", [], [None], {},
    {"a": 1}, {1: 2}, (), [[1, 2]],
)  # fmt: skip


def mutate_tree(
    tree: Any, rng: np.random.Generator, odd: Callable[[Any, np.random.Generator], Any] | None = None
) -> Any:
    """A copy of nested dictionaries, lists and tuples in which a value is another, is missing or stands twice.

    Args:
        tree: what JSON or a checkpoint holds.
        rng: of the draws.
        odd: makes another value of a leaf, or None where it knows none.
    """
    if isinstance(tree, (dict, list, tuple)) and tree and rng.random() < 0.85:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key, kind = keys[int(rng.integers(len(keys)))], rng.random()
        copy: Any = dict(tree) if isinstance(tree, dict) else list(tree)
        if kind < 0.1:
            del copy[key]
        elif kind < 0.15 and isinstance(tree, dict):
            copy[_ODD[int(rng.integers(3, 13))]] = copy.pop(key)
        else:
            copy[key] = mutate_tree(tree[key], rng, odd)
        return tuple(copy) if isinstance(tree, tuple) else copy
    made = odd(tree, rng) if odd is not None and rng.random() < 0.6 else None
    return _ODD[int(rng.integers(len(_ODD)))] if made is None else made
