"""Reads how a file's values are stored from its header, and lists the decoders that give them as they are.

Decoders differ where values are not plain bytes: DALI makes 255 of every float above 1 and shows what a file declares
to be no data, Pillow spreads 15 bits over 16 and drops the lower half of 16-bit colours. A file goes only to decoders
that agree on it, so that what an image looks like does not depend on who decoded it.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

# Tags of a TIFF file (TIFF 6.0; NODATA is GDAL's)
_SUBFILE, _BITS, _PHOTOMETRIC, _FILL_ORDER, _ORIENTATION = 254, 258, 262, 266, 274
_SAMPLES, _PLANAR, _SAMPLE_FORMAT, _NODATA = 277, 284, 339, 42113
_MASK = 4  # a bit of _SUBFILE: this image is the mask of another
_WHITE_IS_ZERO, _CMYK, _LAB = 0, 5, 8
_WIDTHS = {1: "B", 2: "s", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}  # of a tag
_KINDS = {1: "u", 2: "i", 3: "f", 5: "c", 6: "c"}  # of _SAMPLE_FORMAT
_MAX_IMAGES, _MAX_TAGS, _MAX_COUNT = 64, 512, 2**16  # in one TIFF; nothing honest has more
_PNM_HEAD = re.compile(rb"P[1-6](?:\s|#[^\n]*\n)+\d+(?:\s|#[^\n]*\n)+\d+(?:\s|#[^\n]*\n)+(\d+)")
_ALL = ("dali", "rasterio", "pillow")


@dataclass(frozen=True)
class Declared:
    """Storage of a file's values, as its header declares it.

    Attributes:
        bits: of a value.
        kind: "u" unsigned, "i" signed, "f" floating point, "c" complex.
        orientation: 1 to 8 as EXIF numbers them.
        hidden: a mask, or a value that bytes can have, says which pixels are no data.
        inverted: 0 is white.
        decoders: those that give the values as they are, best first.
    """

    bits: int = 8
    kind: str = "u"
    orientation: int = 1
    hidden: bool = False
    inverted: bool = False
    decoders: tuple[str, ...] = ("dali", "pillow")

    @property
    def plain(self) -> bool:
        """Whether values are bytes at most, and all of them are data."""
        return self.kind == "u" and self.bits <= 8 and not self.hidden


def declared(data: bytes | memoryview, kind: str | None) -> Declared:
    """Parse a file's header; one that cannot be parsed declares nothing.

    Args:
        data: the file's bytes.
        kind: its format (`formats.sniff`).
    """
    reader = {"tiff": _tiff, "png": _png, "pnm": _pnm, "jpeg2000": _jpeg2000}.get(kind or "")
    if reader is None:
        return Declared()
    try:
        return reader(data)
    except (
        struct.error,
        IndexError,
        ValueError,
        TypeError,
        OverflowError,
    ):  # hostile or cut short: the decoders will say so
        return Declared(decoders=("rasterio",) if kind in ("tiff", "jpeg2000") else Declared.decoders)


def _png(data: bytes | memoryview) -> Declared:
    """Bits and colour type are in the first chunk. Pillow keeps 8 bits of 16 but for gray, GDAL all."""
    bits, color = data[24], data[25]
    deep = bits == 16
    if not deep:
        return Declared(bits=min(bits, 8))
    return Declared(bits=16, decoders=("pillow",) if color == 0 else ("rasterio",))


def _pnm(data: bytes | memoryview) -> Declared:
    """Pillow spreads values to 8 or 16 bits where the greatest is less, and drops the lower half of 16-bit colours."""
    head = _PNM_HEAD.match(bytes(data[:1024]))
    greatest = int(head[1]) if head and data[1:2] not in (b"1", b"4") else 255
    return Declared(bits=16, decoders=("rasterio",)) if greatest > 255 else Declared(decoders=("dali", "pillow"))


def _jpeg2000(data: bytes | memoryview) -> Declared:
    """Depth of each component, from the image and tile size marker (ISO 15444-1, A.5.1).

    Pillow spreads values over 16 bits and takes one to four components; GDAL gives them as they are.
    """
    start = bytes(data).index(b"\xff\x4f\xff\x51")
    (count,) = struct.unpack_from(">H", data, start + 40)
    depths = [data[start + 42 + 3 * number] for number in range(count)]
    bits, signed = max((depth & 127) + 1 for depth in depths), any(depth & 128 for depth in depths)
    plain = bits == 8 and not signed
    return Declared(bits, "i" if signed else "u", decoders=_ALL if plain else ("rasterio",))


# TIFF


def _tiff(data: bytes | memoryview) -> Declared:
    images = _tiff_images(data)
    tags = next(images, None)
    if tags is None:
        raise ValueError("no image in it")
    bits = max(tags.get(_BITS, [1]))
    kinds = {_KINDS.get(number, "u") for number in tags.get(_SAMPLE_FORMAT, [1])}
    photometric = tags.get(_PHOTOMETRIC, [1])[0]
    mask = any(image.get(_SUBFILE, [0])[0] & _MASK for image in images)
    found = Declared(
        bits=bits,
        kind=next((kind for kind in "cfi" if kind in kinds), "u"),
        orientation=tags.get(_ORIENTATION, [1])[0],
        hidden=mask or _hides_bytes(tags.get(_NODATA)),
        inverted=photometric == _WHITE_IS_ZERO,
    )
    return replace(found, decoders=_tiff_decoders(found, tags))


def _tiff_decoders(found: Declared, tags: dict[int, list]) -> tuple[str, ...]:
    """DALI takes planes, fill orders, inks and inversion with a remark on stderr for each read, and 2 bands wrongly."""
    if not found.plain:
        return ("rasterio",)
    photometric = tags.get(_PHOTOMETRIC, [1])[0]
    if photometric == _LAB:
        return ("pillow",)
    samples = tags.get(_SAMPLES, [1])[0]
    odd = (
        found.bits != 8
        or samples == 2
        or photometric in (_WHITE_IS_ZERO, _CMYK)
        or tags.get(_FILL_ORDER, [1])[0] != 1
        or (samples > 1 and tags.get(_PLANAR, [1])[0] != 1)
    )
    return ("rasterio", "pillow") if odd else _ALL


def _hides_bytes(nodata: Sequence | None) -> bool:
    """Whether a GDAL_NODATA tag declares a value that bytes can have; 0 needs no decoder to become 0."""
    if nodata is None:
        return False
    try:
        return 0 < float(nodata[0]) <= 255
    except ValueError:
        return False


def _tiff_images(data: bytes | memoryview) -> Iterator[dict[int, list]]:
    """Tags of each image of a classic or Big TIFF: numbers, or the text in a list. Unknown types are left out."""
    order = "<" if bytes(data[:2]) == b"II" else ">"
    (version,) = struct.unpack_from(order + "H", data, 2)
    big = version == 43
    word, count_format, entry, inline = ("Q", "Q", 20, 8) if big else ("I", "H", 12, 4)
    (at,) = struct.unpack_from(order + word, data, 8 if big else 4)
    seen = set()
    while at and at not in seen and len(seen) < _MAX_IMAGES:
        seen.add(at)
        (count,) = struct.unpack_from(order + count_format, data, at)
        first = at + struct.calcsize(count_format)
        tags: dict[int, list] = {}
        for place in range(first, first + entry * min(count, _MAX_TAGS), entry):
            tag, kind, number = struct.unpack_from(order + "HH" + word, data, place)
            size = struct.calcsize("=" + _WIDTHS.get(kind, "B"))
            if kind not in _WIDTHS or number * size > _MAX_COUNT:
                tags[tag] = [0]
                continue
            value = place + entry - inline
            if number * size > inline:
                (value,) = struct.unpack_from(order + word, data, value)
            if kind == 2:
                tags[tag] = [bytes(data[value : value + number]).rstrip(b"\0 ").decode("ascii", "replace")]
            else:
                tags[tag] = list(struct.unpack_from(f"{order}{number}{_WIDTHS[kind]}", data, value)) or [0]
        yield tags
        (at,) = struct.unpack_from(order + word, data, first + entry * count)
