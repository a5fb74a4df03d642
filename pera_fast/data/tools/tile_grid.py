"""Positions of a scene's tiles, and the groups of tiles that are read at once."""

from collections.abc import Iterator
from dataclasses import dataclass

_READ_BYTES = 2**27  # of one read; a scene is never held as a whole

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class TileSettings:
    """Options of cutting scenes."""

    size: int = 512  # pixels a side
    overlap: int = 0  # pixels that neighbours share; the last of a row or column may share more
    nodata_max: float = 0.5  # tiles with a greater fraction without data are left out
    format: str = "tif"
    nodata: float | None = None  # value that is no data, where a scene does not say so itself


def starts(length: int, size: int, overlap: int) -> list[int]:
    """Starts of tiles of one size, the last moved back inside; a single, shorter one where there is no room."""
    if length <= size:
        return [0]
    inside = list(range(0, length - size, size - overlap))
    return [*inside, length - size]


def reads(width: int, height: int, pixel_bytes: int, settings: TileSettings) -> Iterator[list[Box]]:
    """Tiles in raster order, grouped so that what is read at once is bounded.

    A read takes as many tiles of a row as the bound allows, and as many rows if a whole one fits: so that a block of
    the file, whatever its shape, is decoded once, or twice where it lies across two reads.
    """
    lefts, tops = starts(width, settings.size, settings.overlap), starts(height, settings.size, settings.overlap)
    step = settings.size - settings.overlap
    tile_height, budget = min(settings.size, height), _READ_BYTES // pixel_bytes
    columns = max(1, (budget // tile_height - settings.overlap) // step)
    rows = 1
    if columns >= len(lefts):
        columns, rows = len(lefts), max(1, (budget // width - settings.overlap) // step)
    for y in range(0, len(tops), rows):
        for x in range(0, len(lefts), columns):
            yield [
                (left, top, min(left + settings.size, width), min(top + settings.size, height))
                for top in tops[y : y + rows]
                for left in lefts[x : x + columns]
            ]
