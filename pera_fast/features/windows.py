"""Reads windows of rasters by the bands and ranges of whole images, so that a scene need not fit in memory."""

import mmap
import os
from contextlib import ExitStack
from typing import Any

import numpy as np

from pera_fast.config import Config
from pera_fast.data.bands.sensor import probe_settings, scaling_of
from pera_fast.data.decoding import decode, formats, with_gdal
from pera_fast.data.decoding.declared import Declared, declared
from pera_fast.data.decoding.scaling import Raster
from pera_fast.errors import UserError, one_line

_CACHE_MIB = 256  # of GDAL, for blocks that lie in several windows
_PLAIN = ("uint8", "uint16", "bool")  # types whose values mean the same in every part of an image


class WindowReader:
    """An open TIFF or JPEG 2000, of which windows are read. Not for several threads at a time; close it.

    Attributes:
        height, width: of the raster.
        declares_nodata: whether pixels may be without data.
    """

    def __init__(self, path: str | os.PathLike[str], cfg: Config):
        """Open a file. Raises UserError if it cannot be read in windows, or has not the bands of the configuration."""
        self._path, self._scaling = path, scaling_of(cfg)
        settings = probe_settings(cfg)
        self._channels, self._bands = settings.channels, settings.bands
        self._stack = ExitStack()
        try:
            self._about = _declared(path)
            self._raster = self._open()
            self.height, self.width = self._raster.height, self._raster.width
            flags = {flag.name for flags in self._raster.mask_flag_enums for flag in flags}
            floats = any(np.dtype(name).kind == "f" for name in self._raster.dtypes)  # which may be NaN
            self.declares_nodata = floats or flags != {"all_valid"}
            self._check()
        except Exception as error:  # a library may raise anything
            self._stack.close()
            raise UserError(f"{path}: cannot be read in windows ({one_line(error, 200)})") from error

    def _open(self) -> Any:
        rasterio = with_gdal.load()
        # Companions are not looked for: an image in memory has none either.
        options = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_CACHEMAX": _CACHE_MIB, "GDAL_NUM_THREADS": "1"}
        self._stack.enter_context(rasterio.Env(**options))
        return self._stack.enter_context(rasterio.open(os.fspath(self._path)))

    def _check(self) -> None:
        if self._about.orientation != 1:
            raise ValueError("its header says that it lies on its side")
        if self._scaling.ranges is None and not set(self._raster.dtypes) <= set(_PLAIN):
            raise ValueError(f"values of {self._raster.dtypes[0]} are scaled by the whole image, for want of a range")
        decode.read_window(self._raster, self._about, self._channels, self._bands, ((0, 1), (0, 1)))  # for its bands

    def __call__(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """A window, uint8 or uint16 [height, width, C]. Raises UserError if it cannot be read."""
        return self._scaling(self._read(top, left, height, width))

    def valid(self, top: int, left: int, height: int, width: int) -> np.ndarray | None:
        """Pixels of a window that have data in any band, bool [height, width]; None: all.

        Raises:
            UserError: it cannot be read.
        """
        if not self.declares_nodata:
            return None
        found = self._read(top, left, height, width)
        parts = [found.valid.any(0)] if found.valid is not None else []
        parts += [found.opaque] if found.opaque is not None else []
        return np.logical_and.reduce(parts) if parts else None

    def _read(self, top: int, left: int, height: int, width: int) -> Raster:
        from rasterio.windows import Window

        window: Any = Window.from_slices((top, top + height), (left, left + width))
        try:
            return decode.read_window(self._raster, self._about, self._channels, self._bands, window)
        except Exception as error:  # a library may raise anything
            raise UserError(f"{self._path}: cannot be read at row {top}, column {left} ({one_line(error)})") from error

    def close(self) -> None:
        """Close the file."""
        self._stack.close()

    def __enter__(self) -> "WindowReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _declared(path: str | os.PathLike[str]) -> Declared:
    """The header of a file of any size, which is mapped and not read. Raises ValueError for other formats."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        kind = formats.sniff(whole[: formats.HEAD_BYTES])
        if kind not in ("tiff", "jpeg2000"):
            raise ValueError(f"a {kind or 'file of unknown format'} is read whole")
        with memoryview(whole) as view:
            return declared(view, kind)
