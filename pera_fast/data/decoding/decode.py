"""Decodes files that DALI cannot, with Pillow or rasterio, and reads headers without decoding.

Two ways. `decode`: 1 or 3 channels of 8 bits by type (`scaling.by_type`), which enter the same pipeline as DALI's
files, as an in-memory PPM or PGM. `read`: any bands as they are stored, with the pixels that the file declares to be no
data; they are scaled and enter the pipeline as arrays. Alpha is dropped where there are 1 or 3 channels to make. A gray
image asked for as colour is repeated; a colour image asked for as gray is weighted by ITU-R 601.
"""

import functools
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from pera_fast.data.decoding.scaling import Raster, Scaling, by_type

Bands = tuple[int | str, ...]  # data.bands; empty: all
_RASTERIO_FORMATS = ("tiff",)  # in the other formats, JPEG 2000 too, GDAL takes a damaged file for a good one
_PIL_TYPES = {"1": (1, "bool"), "I": (1, "int32"), "F": (1, "float32"), "I;16": (1, "uint16")}
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_ORIENTATION = 0x0112
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601
_PNG = b"\x89PNG\r\n\x1a\n"
_ALL_VALID = "all_valid"


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


def can_decode(decoder: str, kind: str | None, raw: bool = False) -> bool:
    """Whether a decoder is for files of this format (`formats.sniff`) at all. raw: for `read`."""
    return decoder != "rasterio" or kind in _RASTERIO_FORMATS or (raw and kind == "png")


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
    if can_decode("rasterio", kind):
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
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        channels, dtype = _PIL_TYPES.get(image.mode[:4]) or (len(image.getbands()), "uint8")
        if _is_deep_png(data):
            dtype = "uint16"
        if image.getexif().get(_ORIENTATION) in _TURNED:
            width, height = height, width
    return Header(width, height, channels, dtype)


def _rasterio_header(data: bytes | memoryview) -> Header:
    with _open_raster(data) as raster:
        return Header(raster.width, raster.height, raster.count, raster.dtypes[0])


def _open_raster(data: bytes | memoryview):  # a rasterio dataset
    return _rasterio().MemoryFile(bytes(data)).open()


@functools.cache
def _rasterio():  # the module, imported late: it loads GDAL
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    # Crops need no georeference. Once, not around each call: filters are the process's, and readers are threads.
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    return rasterio


def decode(data: bytes | memoryview, decoder: str, channels: int) -> np.ndarray:
    """An image as uint8 [H, W, channels], upright, scaled by type.

    Args:
        data: the file's bytes.
        decoder: "pillow" or "rasterio".
        channels: 3 or 1 convert, as DALI does; another number must be what the file has.

    Raises:
        Exception: whatever the library raises; ValueError if the file has another number of bands.
    """
    if channels not in (1, 3):
        return Scaling()(read(data, decoder, channels))
    image = np.moveaxis(_stored(data, decoder, (), convert=True).bands, 0, -1)
    bands = image.shape[2]
    image = by_type(image if bands in (1, 3) else image[..., : 3 if bands > 3 else 1])
    if image.shape[2] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=2)
    return np.asarray(Image.fromarray(image).convert("L"))[..., None]


def read(data: bytes | memoryview, decoder: str, channels: int, bands: Bands = ()) -> Raster:
    """An image's values as they are stored, upright.

    Args:
        data: the file's bytes.
        decoder: "pillow" or "rasterio".
        channels: wanted. Without `bands` 3 and 1 convert as `decode` does; another number must be what the file has.
        bands: which ones, as data.bands has them; empty: all.

    Raises:
        Exception: whatever the library raises; ValueError if the file has not these bands.
    """
    convert = channels in (1, 3) and not bands
    _check_png(data, decoder)
    raster = _stored(data, decoder, bands, convert)
    if np.iscomplexobj(raster.bands):
        raise ValueError("complex values")
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
    if channels == 3:
        return raster.pick([0, 0, 0])
    gray = np.tensordot(_LUMA, raster.bands.astype(np.float64), axes=1)[None]
    integer = raster.bands.dtype.kind in "iu"
    valid = None if raster.valid is None else np.asarray(raster.valid.all(0, keepdims=True))
    return Raster((np.rint(gray) if integer else gray).astype(raster.bands.dtype), valid)


def _check_png(data: bytes | memoryview, decoder: str) -> None:
    """PNG with several channels of 16 bits: Pillow would keep 8 of them, and GDAL takes a damaged file for a good one.

    So GDAL decodes these and nothing else in PNG, after Pillow has read them to their end.
    """
    is_png = bytes(data[:8]) == _PNG
    deep = _is_deep_png(data)
    if decoder == "pillow" and deep:
        raise ValueError("16 bits in several channels")
    if decoder == "rasterio" and is_png:
        if not deep:
            raise ValueError("left to Pillow")
        with Image.open(io.BytesIO(data)) as image:
            image.load()


def _is_deep_png(data: bytes | memoryview) -> bool:
    """Whether it is a PNG of 16 bits with more than gray."""
    return bytes(data[:8]) == _PNG and len(data) > 25 and data[24] == 16 and data[25] in (2, 4, 6)


def _stored(data: bytes | memoryview, decoder: str, bands: Bands, convert: bool) -> Raster:
    """Array that the library reads. convert: palettes, inks and other modes without plain bands become RGB or gray."""
    return _read_rasterio(data, bands, convert) if decoder == "rasterio" else _read_pillow(data, bands, convert)


def _read_pillow(data: bytes | memoryview, bands: Bands, convert: bool) -> Raster:
    with Image.open(io.BytesIO(data)) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode in ("P", "PA", "1") or (image.mode in ("CMYK", "YCbCr", "LAB", "HSV") and convert):
            image = image.convert("L" if image.mode == "1" else "RGB")
        elif image.mode in ("LA", "La") and convert:
            image = image.getchannel(0)
        elif image.mode in ("RGBA", "RGBa", "RGBX") and convert:
            image = Image.merge("RGB", [image.getchannel(band) for band in range(3)])  # convert() may blend
        array = np.asarray(image)
    raster = Raster(array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0))
    return raster.pick([number - 1 for number in band_numbers(bands, len(raster.bands), ())]) if bands else raster


def _read_rasterio(data: bytes | memoryview, bands: Bands, convert: bool) -> Raster:
    with _open_raster(data) as raster:
        numbers = band_numbers(bands, raster.count, raster.descriptions) if bands else list(raster.indexes)
        values = raster.read(numbers)
        meaning = [interpretation.name for interpretation in raster.colorinterp]
        if convert and meaning == ["palette"]:
            table = raster.colormap(1)
            colors = np.array([table.get(index, (0, 0, 0))[:3] for index in range(max(table) + 1)], np.uint8)
            return Raster(np.moveaxis(colors[values[0].clip(max=len(colors) - 1)], -1, 0))
        if convert and meaning[:4] == ["cyan", "magenta", "yellow", "black"]:
            ink = by_type(values[:4]).astype(np.uint16)
            return Raster(((255 - ink[:3]) * (255 - ink[3:]) // 255).astype(np.uint8))
        flags = raster.mask_flag_enums
        if all(_ALL_VALID in {flag.name for flag in flags[number - 1]} for number in numbers):
            return Raster(values)
        return Raster(values, np.asarray(raster.read_masks(numbers) != 0))


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
