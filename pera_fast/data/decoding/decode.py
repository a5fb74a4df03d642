"""Decodes files that DALI cannot, with Pillow or rasterio, and reads headers without decoding.

`read` gives any bands as they are stored, upright, with what the file declares about them: pixels without data, alpha,
offset. `scaling` makes integers of these; as 1 or 3 channels of 8 bits they enter the same pipeline as DALI's files, as
an in-memory PPM or PGM, else as arrays. Alpha is dropped where there are 1 or 3 channels to make. A gray image asked
for as colour is repeated; a colour image asked for as gray is weighted by ITU-R 601.
"""

import contextlib
import functools
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from pera_fast.data.decoding import png
from pera_fast.data.decoding.declared import Declared, declared
from pera_fast.data.decoding.formats import HEAD_BYTES, sniff
from pera_fast.data.decoding.scaling import Raster, Scaling, by_type

Bands = tuple[int | str, ...]  # data.bands; empty: all
_DRIVERS = {"tiff": "GTiff", "jpeg2000": "JP2OpenJPEG", "png": "PNG", "pnm": "PNM"}  # of GDAL
_TOLERANT = ("png", "pnm")  # formats in which GDAL takes a damaged file for a good one, and Pillow does not
_PIL_TYPES = {"1": (1, "bool"), "I": (1, "int32"), "F": (1, "float32"), "I;16": (1, "uint16")}
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_ORIENTATION = 0x0112
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601


@dataclass
class Header:
    """Facts from a file's header; width and height are those of the upright image (EXIF orientation applied)."""

    width: int
    height: int
    channels: int  # as stored; a palette counts as one
    dtype: str


def allow_pixels(max_pixels: int) -> None:
    """Lets Pillow open what data.max_pixels allows; its own guess at what is hostile starts lower."""
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)


def read_header(
    data: bytes | memoryview, kind: str | None, *, codec: bool = True, upright: bool = False
) -> Header | None:
    """The header as nvImageCodec (DALI's own reader), Pillow or rasterio reads it; None if none of them can.

    Args:
        data: the file's bytes.
        kind: its format (`formats.sniff`).
        codec: ask nvImageCodec, which hostile bytes can kill.
        upright: swap width and height where EXIF says that the image lies on its side, which Pillow knows. A full
            decode tells anyway.
    """
    readers = [_codec_header] if codec else []
    readers.insert(0 if upright else len(readers), _pillow_header)
    if kind in _DRIVERS:
        readers.append(_rasterio_header)
    for reader in readers:
        if (header := _try(reader, data)) is not None:
            return header
    return None


def _try(reader: Callable[[bytes | memoryview], Header], data: bytes | memoryview) -> Header | None:
    try:
        return reader(data)
    except Exception:  # a library may raise anything on hostile bytes; the next one may know better
        return None


def _codec_header(data: bytes | memoryview) -> Header:
    from nvidia import nvimgcodec

    stream = nvimgcodec.CodeStream(bytes(data))  # pyright: ignore[reportAttributeAccessIssue] - a compiled module
    return Header(stream.width, stream.height, stream.num_channels, np.dtype(stream.dtype).name)


def _pillow_header(data: bytes | memoryview) -> Header:
    with _open_pillow(data) as image:
        width, height = image.size
        channels, dtype = _PIL_TYPES.get(image.mode[:4]) or (len(image.getbands()), "uint8")
        if channels != 1 and dtype == "uint8" and declared(data, sniff(bytes(data[:HEAD_BYTES]))).bits > 8:
            dtype = "uint16"  # in several channels; Pillow keeps 8 of them
        if _pillow_orientation(image) in _TURNED:
            width, height = height, width
    return Header(width, height, channels, dtype)


def _rasterio_header(data: bytes | memoryview) -> Header:
    kind = sniff(bytes(data[:HEAD_BYTES]))
    with _open_raster(data, kind) as raster:
        width, height = raster.width, raster.height
        if declared(data, kind).orientation in _TURNED:
            width, height = height, width
        return Header(width, height, raster.count, raster.dtypes[0])


@contextlib.contextmanager
def _open_raster(data: bytes | memoryview, kind: str | None) -> Iterator[Any]:  # a rasterio dataset
    rasterio = _rasterio()
    # Threads of JPEG 2000 swallow the errors of damaged tiles. One driver: no other may find something in the bytes.
    with (
        rasterio.Env(GDAL_NUM_THREADS="1"),
        rasterio.MemoryFile(bytes(data)) as file,
        file.open(driver=_DRIVERS[kind or ""]) as raster,
    ):
        yield raster


@functools.cache
def _rasterio():  # the module, imported late: it loads GDAL
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    # Crops need no georeference. Once, not around each call: filters are the process's, and readers are threads.
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    return rasterio


def decode(data: bytes | memoryview, decoder: str, channels: int) -> np.ndarray:
    """An image as uint8 [H, W, channels], upright, scaled by type; arguments and errors as of `read`."""
    return Scaling()(read(data, decoder, channels))


def read_any(data: bytes | memoryview, channels: int, bands: Bands = ()) -> Raster:
    """`read` with the first library that can. Raises ValueError with all their reasons."""
    failures = []
    for decoder in declared(data, sniff(bytes(data[:HEAD_BYTES]))).decoders:
        if decoder == "dali":  # gives 8 bits whatever is stored
            continue
        try:
            return read(data, decoder, channels, bands)
        except Exception as error:  # a library may raise anything on hostile bytes; the next one may know better
            failures.append(" ".join(str(error).split()) or type(error).__name__)
    raise ValueError("; ".join(failures))


def read(data: bytes | memoryview, decoder: str, channels: int, bands: Bands = ()) -> Raster:
    """An image's values as they are stored, upright.

    Args:
        data: the file's bytes.
        decoder: "pillow" or "rasterio".
        channels: wanted. Without `bands` 3 and 1 convert: gray is repeated, colour weighted; another number must be
            what the file has.
        bands: which ones, as data.bands has them; empty: all.

    Raises:
        Exception: whatever the library raises; ValueError if the file has not these bands.
    """
    convert = channels in (1, 3) and not bands
    kind = sniff(bytes(data[:HEAD_BYTES]))
    about = declared(data, kind)
    if decoder not in about.decoders:
        raise ValueError(f"left to {about.decoders[-1]}, which reads these values as they are stored")
    if kind == "png" and (told := png.damage(data)):
        raise ValueError(told)
    if decoder == "rasterio":
        raster = _read_rasterio(data, kind, about, bands, convert)
    else:
        raster = _read_pillow(data, bands, convert)
    if np.iscomplexobj(raster.bands):
        raise ValueError("complex values")
    raster = _without_nan(raster)
    stored = len(raster.bands)
    if not convert:
        if stored != channels:
            hint = ": data.bands chooses among them" if stored > channels else ""
            raise ValueError(f"has {stored} band(s), model.in_chans is {channels}{hint}")
        return raster
    if stored not in (1, 3):
        stored = 3 if stored > 3 else 1
        raster = raster.pick(list(range(stored)))
    if stored == channels:
        return raster
    return raster.pick([0, 0, 0]) if channels == 3 else _gray(raster)


def _without_nan(raster: Raster) -> Raster:
    """NaN and infinities count as no data."""
    if raster.bands.dtype.kind != "f":
        return raster
    finite = np.isfinite(raster.bands)
    if finite.all():
        return raster
    return replace(raster, valid=finite if raster.valid is None else finite & raster.valid)


def _gray(raster: Raster) -> Raster:
    """One channel of red, green and blue."""
    bands, shift = raster.bands, raster.shift
    if bands.dtype == np.uint8:
        gray = np.asarray(Image.fromarray(np.ascontiguousarray(np.moveaxis(bands, 0, -1))).convert("L"))[None]
    else:
        gray = np.tensordot(_LUMA, bands.astype(np.float64), axes=1)[None]
        gray = (np.rint(gray) if bands.dtype.kind in "iu" else gray).astype(bands.dtype)
    valid = None if raster.valid is None else np.asarray(raster.valid.all(0, keepdims=True))
    shift = None if shift is None else np.array([shift @ np.array(_LUMA)])
    return Raster(gray, valid, raster.opaque, shift, None if raster.scale is None else raster.scale[:1])


# Pillow


def _read_pillow(data: bytes | memoryview, bands: Bands, convert: bool) -> Raster:
    with _open_pillow(data) as opened:
        opened.load()
        alpha = _pillow_alpha(opened) if convert else None
        image = opened
        if image.mode in ("P", "PA", "1") or (image.mode in ("CMYK", "YCbCr", "LAB", "HSV") and convert):
            image = image.convert("L" if image.mode == "1" else "RGB")
        elif image.mode in ("LA", "La") and convert:
            image = image.getchannel(0)
        elif image.mode in ("RGBA", "RGBa", "RGBX") and convert:
            image = Image.merge("RGB", [image.getchannel(band) for band in range(3)])  # convert() may blend
        array = np.asarray(image)
        orientation = _pillow_orientation(opened)
    array = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    raster = Raster(upright(array, orientation), opaque=None if alpha is None else upright(alpha, orientation))
    return raster.pick([number - 1 for number in band_numbers(bands, len(raster.bands), ())]) if bands else raster


def _open_pillow(data: bytes | memoryview) -> Image.Image:
    """The image without a PNG's texts: Pillow refuses an image for a long one, and unpacks what nobody reads."""
    return Image.open(io.BytesIO(_without_texts(data)))


def _without_texts(data: bytes | memoryview) -> bytes | memoryview:
    return png.without_texts(data) if sniff(bytes(data[:HEAD_BYTES])) == "png" else data


def _pillow_orientation(image: Image.Image) -> int:
    """EXIF orientation as DALI takes it: not XMP's, which `getexif` consults. Pillow turns a TIFF when it loads it."""
    if image.format == "TIFF":
        return image.getexif().get(_ORIENTATION, 1)
    exif = Image.Exif()
    exif.load(image.info.get("exif") or b"")
    return exif.get(_ORIENTATION, 1)


def _pillow_alpha(image: Image.Image) -> np.ndarray | None:
    """Pixels whose alpha is not 0, bool [H, W]; None: all."""
    if not image.has_transparency_data:
        return None
    alpha = image if "A" in image.getbands() else image.convert("RGBA")
    opaque = np.asarray(alpha.getchannel("A")) != 0
    return None if opaque.all() else opaque


def upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """[..., H, W] as it is stored to how it is to be looked at; orientation as EXIF numbers it."""
    if orientation in _TURNED:
        array = np.swapaxes(array, -1, -2)
    if orientation in (3, 4, 7, 8):
        array = array[..., ::-1, :]
    if orientation in (2, 3, 6, 7):
        array = array[..., ::-1]
    return array


# GDAL


def _read_rasterio(data: bytes | memoryview, kind: str | None, about: Declared, bands: Bands, convert: bool) -> Raster:
    orientation = about.orientation
    if kind in _TOLERANT:
        with _open_pillow(data) as image:
            image.load()
            orientation = _pillow_orientation(image)
        data = _without_texts(data)
    with _open_raster(data, kind) as raster:
        numbers = band_numbers(bands, raster.count, raster.descriptions) if bands else list(raster.indexes)
        values = raster.read(numbers)
        valid, opaque = _masks(raster, numbers, convert)
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
    valid, opaque = (None if each is None else upright(each, orientation) for each in (valid, opaque))
    return Raster(upright(values, orientation), valid, opaque, shift, scale)


def _masks(raster: Any, numbers: list[int], convert: bool) -> tuple[np.ndarray | None, np.ndarray | None]:
    """`valid` and `opaque` of a Raster. An alpha band that is asked for as a band hides nothing."""
    kinds = [{flag.name for flag in raster.mask_flag_enums[number - 1]} for number in numbers]
    valid = opaque = None
    if any(not kind & {"all_valid", "alpha"} for kind in kinds):
        valid = np.asarray(raster.read_masks(numbers) != 0)
        for place, kind in enumerate(kinds):
            valid[place] |= "alpha" in kind
    alpha = [place for place, kind in enumerate(raster.colorinterp, 1) if kind.name == "alpha"]
    if alpha and (convert or alpha[0] not in numbers):
        opaque = raster.read(alpha[0]) != 0
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


def band_numbers(bands: Bands, count: int, names: Sequence[str | None]) -> list[int]:
    """Numbers from 1 of bands that are numbers or names already. Raises ValueError for what is not there."""
    known = {name.strip().casefold(): number for number, name in reversed(list(enumerate(names, 1))) if name}
    numbers = []
    for band in bands:
        number = band if isinstance(band, int) else known.get(band.strip().casefold())
        if number is None:
            has = f"its bands are {', '.join(name or '-' for name in names)}" if known else "its bands have no names"
            raise ValueError(f"has no band {band}: {has}")
        if number > count:
            raise ValueError(f"has no band {number}: it has {count} band(s)")
        numbers.append(number)
    return numbers


def as_pnm(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3 or 1] as a binary PPM or PGM file, uint8 [bytes]: DALI decodes it without loss."""
    height, width, channels = image.shape
    head = b"P%d\n%d %d\n255\n" % (6 if channels == 3 else 5, width, height)
    return np.concatenate([np.frombuffer(head, np.uint8), image.reshape(-1)])
