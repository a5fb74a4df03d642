"""Reads values with Pillow: as they are stored where `declared` names it, with alpha, upright."""

import io

import numpy as np
from PIL import Image

from pera_fast.data.decoding import png
from pera_fast.data.decoding.band_numbers import Bands, band_numbers
from pera_fast.data.decoding.formats import HEAD_BYTES, sniff
from pera_fast.data.decoding.scaling import Raster
from pera_fast.data.decoding.upright import upright

_ORIENTATION = 0x0112


def read(data: bytes | memoryview, bands: Bands, convert: bool) -> Raster:
    """Values of an image. convert: palettes, inks and other modes without plain bands become RGB or gray."""
    with open_image(data) as opened:
        opened.load()
        alpha = _opaque(opened) if convert else None
        image = opened
        if image.mode in ("P", "PA", "1") or (image.mode in ("CMYK", "YCbCr", "LAB", "HSV") and convert):
            image = image.convert("L" if image.mode == "1" else "RGB")
        elif image.mode in ("LA", "La") and convert:
            image = image.getchannel(0)
        elif image.mode in ("RGBA", "RGBa", "RGBX") and convert:
            image = Image.merge("RGB", [image.getchannel(band) for band in range(3)])  # convert() may blend
        array = np.asarray(image)
        orientation = orientation_of(opened)
    array = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    raster = Raster(upright(array, orientation), opaque=None if alpha is None else upright(alpha, orientation))
    return raster.pick([number - 1 for number in band_numbers(bands, len(raster.bands), ())]) if bands else raster


def open_image(data: bytes | memoryview) -> Image.Image:
    """The image without a PNG's texts: Pillow refuses an image for a long one, and unpacks what nobody reads."""
    return Image.open(io.BytesIO(without_texts(data)))


def without_texts(data: bytes | memoryview) -> bytes | memoryview:
    """A PNG without its texts; other files as they are."""
    return png.without_texts(data) if sniff(bytes(data[:HEAD_BYTES])) == "png" else data


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation as DALI takes it: not XMP's, which `getexif` consults. Pillow turns a TIFF when it loads it."""
    if image.format == "TIFF":
        return image.getexif().get(_ORIENTATION, 1)
    exif = Image.Exif()
    exif.load(image.info.get("exif") or b"")
    return exif.get(_ORIENTATION, 1)


def _opaque(image: Image.Image) -> np.ndarray | None:
    """Pixels whose alpha is not 0, bool [H, W]; None: all."""
    if not image.has_transparency_data:
        return None
    key = image.info.get("transparency")
    if isinstance(key, int) and image.mode[0] in "LI":  # a gray that is transparent; convert() knows it for 8 bits only
        opaque = np.asarray(image) != key
    else:
        alpha = image if "A" in image.getbands() else image.convert("RGBA")
        opaque = np.asarray(alpha.getchannel("A")) != 0
    return None if opaque.all() else opaque
