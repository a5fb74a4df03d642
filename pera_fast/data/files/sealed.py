"""Digests in Parquet files, of all their other bytes: damage is found before any of them is believed.

Parquet's own checksums leave out the description at the end, and a damaged one can crash its reader. The digest stands
before that description, where Parquet's readers look for nothing.
"""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

_MAGIC = b"PERASEAL"
_DIGEST = 16  # bytes
_TAIL = 8  # bytes of the description's length, and Parquet's mark
_PIECE = 2**20


def seal(path: Path) -> None:
    """Put a digest into a Parquet file that has none. Raises OSError."""
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        start = _description(file, size)
        file.seek(start)
        description = file.read()
        digest = _digest(file, start, description)
        file.seek(start)
        file.write(_MAGIC + digest + description)


def check_seal(path: Path) -> bool:
    """Whether a Parquet file has a digest.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not what was written.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        start = _description(file, size)
        at = start - len(_MAGIC) - _DIGEST
        if at < 0:
            return False
        file.seek(at)
        seal_ = file.read(len(_MAGIC) + _DIGEST)
        if not seal_.startswith(_MAGIC):
            return False
        if _digest(file, at, file.read()) != seal_[len(_MAGIC) :]:
            raise ValueError("damaged: its digest is not that of its contents")
        return True


def _description(file: BinaryIO, size: int) -> int:
    """Offset of a Parquet file's description; raises ValueError where there is none."""
    if size < _TAIL:
        raise ValueError("not a Parquet file")
    file.seek(size - _TAIL)
    tail = file.read(_TAIL)
    start = size - _TAIL - int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or start < 4:
        raise ValueError("not a Parquet file, or cut short")
    return start


def _digest(file: BinaryIO, end: int, description: bytes) -> bytes:
    """Digest of the first `end` bytes and the description."""
    digest = hashlib.blake2b(digest_size=_DIGEST)
    file.seek(0)
    while end:
        piece = file.read(min(end, _PIECE))
        if not piece:
            raise ValueError("cut short")
        digest.update(piece)
        end -= len(piece)
    digest.update(description)
    return digest.digest()
