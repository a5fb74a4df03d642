"""Reads values with GDAL (rasterio): as they are stored, with what the file declares about them, upright."""

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from pera_fast.data.decoding.band_numbers import Bands, band_numbers
from pera_fast.data.decoding.declared import Declared
from pera_fast.data.decoding.scaling import Raster, by_type
from pera_fast.data.decoding.upright import upright
from pera_fast.data.decoding.with_pillow import open_image, orientation_of, without_texts

DRIVERS = {"tiff": "GTiff", "jpeg2000": "JP2OpenJPEG", "png": "PNG", "pnm": "PNM"}
_MOST_BLOCK = 2**24  # pixels of a block that are no matter
_TOLERANT = ("png", "pnm")  # formats in which GDAL takes a damaged file for a good one, and Pillow does not


def read(data: bytes | memoryview, kind: str | None, about: Declared, bands: Bands, convert: bool) -> Raster:
    """Values of a file. convert: palettes and inks become RGB."""
    orientation = about.orientation
    if kind in _TOLERANT:
        with open_image(data) as image:
            image.load()
            orientation = orientation_of(image)
        data = without_texts(data)
    with open_raster(data, kind) as raster:
        found = read_open(raster, about, bands, convert)
    valid, opaque = (None if each is None else upright(each, orientation) for each in (found.valid, found.opaque))
    return Raster(upright(found.bands, orientation), valid, opaque, found.shift, found.scale)


def read_open(raster: Any, about: Declared, bands: Bands, convert: bool, window: Any = None) -> Raster:
    """Values of an open rasterio dataset, or of a window of it, as they lie there: not turned upright."""
    _check_blocks(raster)
    numbers = band_numbers(bands, raster.count, raster.descriptions) if bands else list(raster.indexes)
    values = raster.read(numbers, window=window)
    valid, opaque = _masks(raster, numbers, convert, window)
    meaning = [interpretation.name for interpretation in raster.colorinterp]
    if convert and meaning == ["palette"]:
        values = _palette(raster, values)
        valid = None if valid is None else np.repeat(valid, 3, axis=0)
    elif convert and meaning[:4] == ["cyan", "magenta", "yellow", "black"]:
        ink = by_type(values[:4]).astype(np.uint16)
        values = ((255 - ink[:3]) * (255 - ink[3:]) // 255).astype(np.uint8)
        valid = None if valid is None else valid[:3]
    else:
        values = _full_bytes(values, about, palette="palette" in meaning)
    deep = values.dtype not in (np.uint8, np.bool_)
    scale, shift = _scale_and_shift(raster, numbers) if deep else (None, None)
    return Raster(values, valid, opaque, shift, scale)


def _check_blocks(raster: Any) -> None:
    """Raises ValueError for blocks far larger than the image, for which GDAL would take memory all the same."""
    for height, width in raster.block_shapes:
        if height * width > max(4 * raster.width * raster.height, _MOST_BLOCK):
            raise ValueError(f"has blocks of {width} x {height} pixels, the image {raster.width} x {raster.height}")


@contextlib.contextmanager
def open_raster(data: bytes | memoryview, kind: str | None) -> Iterator[Any]:  # a rasterio dataset
    rasterio = load()
    # Threads of JPEG 2000 swallow the errors of damaged tiles. One driver: no other may find something in the bytes.
    with (
        rasterio.Env(GDAL_NUM_THREADS="1"),
        rasterio.MemoryFile(bytes(data)) as file,
        file.open(driver=DRIVERS[kind or ""]) as raster,
    ):
        yield raster


@functools.cache
def load() -> Any:
    """The module rasterio, imported late: it loads GDAL."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    # Crops need no georeference. Once, not around each call: filters are the process's, and readers are threads.
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    return rasterio


def _masks(
    raster: Any, numbers: list[int], convert: bool, window: Any = None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """`valid` and `opaque` of a Raster. An alpha band that is asked for as a band hides nothing."""
    kinds = [{flag.name for flag in raster.mask_flag_enums[number - 1]} for number in numbers]
    valid = opaque = None
    if any(not kind & {"all_valid", "alpha"} for kind in kinds):
        valid = np.asarray(raster.read_masks(numbers, window=window) != 0)
        for place, kind in enumerate(kinds):
            valid[place] |= "alpha" in kind
    alpha = [place for place, kind in enumerate(raster.colorinterp, 1) if kind.name == "alpha"]
    if alpha and (convert or alpha[0] not in numbers):
        opaque = raster.read(alpha[0], window=window) != 0
    return (None if valid is None or valid.all() else valid), (None if opaque is None or opaque.all() else opaque)


def _palette(raster: Any, values: np.ndarray) -> np.ndarray:
    table = raster.colormap(1)
    colors = np.array([table.get(index, (0, 0, 0))[:3] for index in range(max(table) + 1)], np.uint8)
    return np.moveaxis(colors[values[0].clip(max=len(colors) - 1)], -1, 0)


def _full_bytes(values: np.ndarray, about: Declared, palette: bool) -> np.ndarray:
    """Fewer than 8 bits spread to 8, and 0 black, as DALI and Pillow have it; more bits as they are stored."""
    if values.dtype != np.uint8 or about.bits > 8 or palette:
        return values
    if about.bits < 8 and values.max(initial=0) < 2**about.bits:
        values = values * np.uint8(255 // (2**about.bits - 1)) if about.bits in (1, 2, 4) else values
    return 255 - values if about.inverted else values


def _scale_and_shift(raster: Any, numbers: list[int]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Declared scale of each band, and its declared offset in steps of that scale; None: none declares one."""
    scales, offsets = (np.array([told[number - 1] for number in numbers]) for told in (raster.scales, raster.offsets))
    if not (np.isfinite(scales) & np.isfinite(offsets) & (scales != 0)).all():
        return None, None
    shift = offsets / scales
    near = np.rint(shift)
    shift = np.where(np.abs(shift - near) < 1e-6 * np.maximum(1, np.abs(near)), near, shift)  # -0.1 / 1e-4: no integer
    return (scales if (scales != 1).any() else None), (shift if shift.any() else None)
