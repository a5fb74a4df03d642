"""Writes predicted masks row by row: GeoTIFF where the image has a place on the ground, else PNG."""

import colorsys
import os
from pathlib import Path
from typing import Any

import numpy as np

from pera_fast.data.decoding import with_gdal
from pera_fast.data.tools.tile_place import Place, PlaceError
from pera_fast.durable import whole_file

_BLOCK = 256  # pixels a side of a GeoTIFF's tiles
NODATA = 255  # of masks of bytes, where the image has no data
_FIRST = ((0, 0, 0), (255, 140, 0))  # colours of classes 0 and 1


def place_of(path: Path, height: int, width: int) -> dict[str, Any] | str | None:
    """Keywords for rasterio that give a mask the place of an image.

    Returns:
        None for an image without a place; a text that says why it cannot be kept.
    """
    rasterio = with_gdal.load()
    try:
        with rasterio.open(os.fspath(path)) as scene:
            if (scene.height, scene.width) != (height, width):
                return "its pixels lie on their side"
            if scene.crs is None and scene.transform.is_identity and not scene.gcps[0] and scene.rpcs is None:
                return None
            return Place(scene).written((0, 0, width, height))
    except PlaceError as error:
        return str(error)
    except Exception:  # a format that GDAL does not know has no place
        return None


def colors(classes: int) -> list[tuple[int, int, int]]:
    """A colour for each class, black for the first; neighbours in number are far apart in hue."""
    found = list(_FIRST[:classes])
    for number in range(len(found), classes):
        red, green, blue = colorsys.hsv_to_rgb(
            number * 0.618034 % 1, 0.6 + 0.4 * (number % 2), 1.0 - 0.15 * (number % 3)
        )
        found.append((round(255 * red), round(255 * green), round(255 * blue)))
    return found


class MaskWriter:
    """Context manager: a mask that is written from top to bottom, and is there once it is whole.

    Args:
        out: path without suffix; `.tif` or `.png` is added.
        height, width: of the mask.
        classes: names of the classes; up to 255 of them make a mask of bytes, more one of 16 bits.
        place: keywords for rasterio; None: a PNG.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, out: Path, height: int, width: int, classes: tuple[str, ...], place: dict[str, Any] | None):
        self.path = out.with_name(out.name + (".png" if place is None else ".tif"))
        self._classes, self._place, self._width = classes, place, width
        self._dtype = np.dtype(np.uint8 if len(classes) <= NODATA else np.uint16)
        self._rows = np.zeros((height if place is None else _BLOCK, width), self._dtype)
        self._filled, self._top, self._height = 0, 0, height

    def __enter__(self) -> "MaskWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._whole = whole_file(self.path)
        self._partial = self._whole.__enter__()
        self._file = None if self._place is None else self._open(self._place)
        return self

    def _open(self, place: dict[str, Any]) -> Any:
        file = with_gdal.load().open(
            os.fspath(self._partial), "w", driver="GTiff", height=self._height, width=self._width, count=1,
            dtype=self._dtype.name, tiled=True, blockxsize=_BLOCK, blockysize=_BLOCK, compress="deflate",
            BIGTIFF="IF_SAFER", nodata=NODATA if self._dtype == np.uint8 else None, **place,
        )  # fmt: skip
        file.update_tags(CLASSES=", ".join(self._classes))
        file.write_colormap(1, dict(enumerate((*color, 255) for color in colors(len(self._classes)))))
        return file

    def write(self, rows: np.ndarray, valid: np.ndarray | None = None) -> None:
        """The next rows [h, W] of class numbers, and where they have data, bool [h, W]."""
        rows = rows.astype(self._dtype)
        if valid is not None and self._file is not None and self._dtype == np.uint8:
            rows[~valid] = NODATA
        while len(rows):  # whole blocks, each of which is then compressed once
            count = min(len(rows), len(self._rows) - self._filled)
            self._rows[self._filled : self._filled + count] = rows[:count]
            self._filled, rows = self._filled + count, rows[count:]
            if self._filled == len(self._rows):
                self._flush()

    def _flush(self) -> None:
        from rasterio.windows import Window

        if self._file is None or not self._filled:
            return
        window: Any = Window.from_slices((self._top, self._top + self._filled), (0, self._width))
        self._file.write(self._rows[: self._filled], 1, window=window)
        self._top, self._filled = self._top + self._filled, 0

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if self._file is not None:
                if kind is None:
                    self._flush()
                self._file.close()
            elif kind is None:
                self._write_png()
        except BaseException as own:
            self._whole.__exit__(type(own), own, own.__traceback__)
            raise
        self._whole.__exit__(kind, error, trace)

    def _write_png(self) -> None:
        from PIL import Image

        image = Image.fromarray(self._rows)
        if self._dtype == np.uint8:
            image.putpalette([value for color in colors(len(self._classes)) for value in color])
        image.save(self._partial, "PNG")


def mask_there(out: Path) -> bool:
    """Whether a mask of this name has been written."""
    return any(out.with_name(out.name + suffix).exists() for suffix in (".tif", ".png"))
