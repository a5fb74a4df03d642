"""The chunks of a PNG file: texts that nobody reads, and checksums."""

import struct
import zlib
from collections.abc import Iterator

_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # chunks that say nothing of pixels


def chunks(data: bytes | memoryview) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of each chunk, in bytes; the last one may reach beyond the file."""
    at = 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 12 + length
        yield bytes(data[at + 4 : at + 8]), at, end
        at = end


def without_texts(data: bytes | memoryview) -> bytes | memoryview:
    """The file without its texts."""
    kept, start = [], 0  # `start`: of the bytes that are kept next
    for kind, at, end in chunks(data):
        if kind in _TEXTS:
            kept.append(data[start:at])
            start = end
    return b"".join([*kept, data[start:]]) if kept else data


def damage(data: bytes | memoryview) -> str:
    """Damage that the checksums of a PNG's critical chunks show, those that decoders need; empty: none.

    Pillow stops at the last pixel, before it has met the checksum of a chunk whose middle was damaged.
    """
    for kind, at, end in chunks(data):
        if end > len(data) or kind == b"IEND":  # cut short: the decoders will say so
            break
        needed = kind.isalpha() and kind[:1].isupper()
        if needed and zlib.crc32(data[at + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            return f"checksum of the PNG's {kind.decode()} chunk is wrong"
    return ""
