"""Decodes files that DALI cannot, with Pillow or rasterio, and reads headers without decoding.

`read` gives any bands as they are stored, upright, with what the file declares about them: pixels without data, alpha,
offset. `scaling` makes integers of these; as 1 or 3 channels of 8 bits they enter the same pipeline as DALI's files, as
an in-memory PPM or PGM, else as arrays. Alpha is dropped where there are 1 or 3 channels to make. A gray image asked
for as colour is repeated; a colour image asked for as gray is weighted by ITU-R 601.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from pera_fast.data.decoding import png, with_gdal, with_pillow
from pera_fast.data.decoding.band_numbers import Bands
from pera_fast.data.decoding.declared import Declared, declared
from pera_fast.data.decoding.formats import HEAD_BYTES, sniff
from pera_fast.data.decoding.scaling import Raster, Scaling
from pera_fast.data.decoding.upright import TURNED

_PIL_TYPES = {"1": (1, "bool"), "I": (1, "int32"), "F": (1, "float32"), "I;16": (1, "uint16")}
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
    if kind in with_gdal.DRIVERS:
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
    with with_pillow.open_image(data) as image:
        width, height = image.size
        channels, dtype = _PIL_TYPES.get(image.mode[:4]) or (len(image.getbands()), "uint8")
        if channels != 1 and dtype == "uint8" and declared(data, sniff(bytes(data[:HEAD_BYTES]))).bits > 8:
            dtype = "uint16"  # in several channels; Pillow keeps 8 of them
        if with_pillow.orientation_of(image) in TURNED:
            width, height = height, width
    return Header(width, height, channels, dtype)


def _rasterio_header(data: bytes | memoryview) -> Header:
    kind = sniff(bytes(data[:HEAD_BYTES]))
    with with_gdal.open_raster(data, kind) as raster:
        width, height = raster.width, raster.height
        if declared(data, kind).orientation in TURNED:
            width, height = height, width
        return Header(width, height, raster.count, raster.dtypes[0])


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
        raster = with_gdal.read(data, kind, about, bands, convert)
    else:
        raster = with_pillow.read(data, bands, convert)
    return _converted(raster, channels, convert)


def read_window(raster: Any, about: Declared, channels: int, bands: Bands, window: Any) -> Raster:
    """As `read`, of a window of an open rasterio dataset. The values are not turned upright.

    Args:
        raster: the dataset.
        about: declared by the file's header; orientation 1.
        channels, bands: as of `read`.
        window: of rasterio.

    Raises:
        Exception: whatever GDAL raises; ValueError if the file has not these bands.
    """
    convert = channels in (1, 3) and not bands
    return _converted(with_gdal.read_open(raster, about, bands, convert, window), channels, convert)


def _converted(raster: Raster, channels: int, convert: bool) -> Raster:
    """A file's bands as the channels that are wanted."""
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


def as_pnm(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3 or 1] as a binary PPM or PGM file, uint8 [bytes]: DALI decodes it without loss."""
    height, width, channels = image.shape
    head = b"P%d\n%d %d\n255\n" % (6 if channels == 3 else 5, width, height)
    return np.concatenate([np.frombuffer(head, np.uint8), image.reshape(-1)])
