"""What DALI cannot decode, decoded by Pillow or rasterio to uint8, and read from a header without decoding.

Scaling to 8 bit (`to_uint8`): uint8 as it is; bool x 255; uint16 / 257; any other type: values that lie in [0, 1] if it
is a float type x 255, else min to max of the file's finite values becomes 0 to 255. What is not finite becomes 0.
Alpha is dropped. A gray image asked for as colour is repeated; a colour image asked for as gray is weighted by ITU-R
601. The result reaches the same pipeline as an in-memory PPM or PGM file, or as a raw array.
"""

import functools
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

_RASTERIO_FORMATS = ("tiff",)  # in the other formats, JPEG 2000 too, GDAL takes a damaged file for a good one
_PIL_TYPES = {"1": (1, "bool"), "I": (1, "int32"), "F": (1, "float32"), "I;16": (1, "uint16")}
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_ORIENTATION = 0x0112


@dataclass
class Header:
    """What a file says about itself; width and height as the pipeline sees them (turned upright by EXIF)."""

    width: int
    height: int
    channels: int  # as stored; a palette counts as one
    dtype: str


def allow_pixels(max_pixels: int) -> None:
    """Lets Pillow open what data.max_pixels allows; its own guess at what is hostile starts lower."""
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)


def can_decode(decoder: str, kind: str | None) -> bool:
    """Whether a decoder is for files of this format (`formats.sniff`) at all."""
    return decoder != "rasterio" or kind in _RASTERIO_FORMATS


def read_header(
    data: bytes | memoryview, kind: str | None, *, codec: bool = True, upright: bool = False
) -> Header | None:
    """The header as nvImageCodec (DALI's own reader), else Pillow, else rasterio reads it; None if none of them can.

    Args:
        data: the file's bytes.
        kind: its format (`formats.sniff`).
        codec: ask nvImageCodec, which hostile bytes can kill.
        upright: swap width and height where EXIF says that the image lies on its side. A full decode tells anyway.
    """
    pillow = _try(_pillow_header, data) if upright else None
    header = (_try(_codec_header, data) if codec else None) or pillow or _try(_pillow_header, data)
    if header is None and can_decode("rasterio", kind):
        header = _try(_rasterio_header, data)
    if header is not None and pillow is not None:
        header.width, header.height = pillow.width, pillow.height
    return header


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
    """The image as uint8 [H, W, channels], upright.

    Args:
        data: the file's bytes.
        decoder: "pillow" or "rasterio".
        channels: 3 or 1 convert; another number must be what the file has.

    Raises:
        Exception: whatever the library raises; ValueError if the file has another number of bands.
    """
    native = channels not in (1, 3)
    image = (_decode_rasterio if decoder == "rasterio" else _decode_pillow)(data, native)
    if native:
        if image.shape[2] != channels:
            raise ValueError(f"has {image.shape[2]} band(s), model.in_chans is {channels}")
        return to_uint8(image)
    bands = image.shape[2]
    image = to_uint8(image if bands in (1, 3) else image[..., : 3 if bands > 3 else 1])
    if image.shape[2] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=2)
    return np.asarray(Image.fromarray(image).convert("L"))[..., None]


def _decode_pillow(data: bytes | memoryview, native: bool) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode in ("P", "PA", "1") or (image.mode in ("CMYK", "YCbCr", "LAB", "HSV") and not native):
            image = image.convert("L" if image.mode == "1" else "RGB")
        elif image.mode in ("LA", "La") and not native:
            image = image.getchannel(0)
        elif image.mode in ("RGBA", "RGBa", "RGBX") and not native:
            image = Image.merge("RGB", [image.getchannel(band) for band in range(3)])  # convert() may blend
        array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def _decode_rasterio(data: bytes | memoryview, native: bool) -> np.ndarray:
    with _open_raster(data) as raster:
        bands = np.moveaxis(raster.read(), 0, -1)
        meaning = [interpretation.name for interpretation in raster.colorinterp]
        if native:
            return bands
        if meaning == ["palette"]:
            table = raster.colormap(1)
            colors = np.array([table.get(index, (0, 0, 0))[:3] for index in range(max(table) + 1)], np.uint8)
            return colors[bands[..., 0].clip(max=len(colors) - 1)]
        if meaning[:4] == ["cyan", "magenta", "yellow", "black"]:
            ink = to_uint8(bands[..., :4]).astype(np.uint16)
            return ((255 - ink[..., :3]) * (255 - ink[..., 3:]) // 255).astype(np.uint8)
        return bands


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Any numeric type to uint8, by the rule at the top of this file."""
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    if image.dtype == np.bool_:
        return image.astype(np.uint8) * np.uint8(255)
    if image.dtype.kind == "u" and image.dtype.itemsize == 2:  # of either byte order
        return ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if np.iscomplexobj(image):
        raise ValueError("complex values")
    values = image.astype(np.float64)
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    if np.issubdtype(image.dtype, np.floating) and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = (values - low) / (high - low) * 255 if high > low else np.zeros_like(values)
    return np.rint(np.where(finite, scaled, 0).clip(0, 255)).astype(np.uint8)


def as_pnm(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3 or 1] as a binary PPM or PGM file, uint8 [bytes]: DALI decodes it without loss."""
    height, width, channels = image.shape
    head = b"P%d\n%d %d\n255\n" % (6 if channels == 3 else 5, width, height)
    return np.concatenate([np.frombuffer(head, np.uint8), image.reshape(-1)])
