"""Fingerprints of images that small changes hardly move, to find near-duplicates among millions.

The hash is the classic perceptual one: 32 x 32 gray means, their two-dimensional cosine transform (DCT-II), the signs
of the 63 lowest frequencies without the mean and of one more, against their median. Scaling, encoding and light
retouching flip a few of its 64 bits; unrelated images differ in about half. Because a hash says nothing of colour and
brightness, and little of an image without structure, means of a 4 x 4 grid go with it.
"""

import io
from dataclasses import replace

import numpy as np
from PIL import Image

from pera_fast.data.decoding import decode
from pera_fast.data.decoding.scaling import Scaling

GRID = 4
_SIDE, _KEPT = 32, 8
_DRAFT = 4 * _SIDE  # JPEG is decoded at the smallest eighth that is at least this


def _cosines() -> np.ndarray:
    """[_KEPT, _SIDE]: the lowest rows of the DCT-II matrix."""
    frequency, place = np.arange(_KEPT)[:, None], np.arange(_SIDE)[None]
    return np.cos(np.pi * frequency * (2 * place + 1) / (2 * _SIDE))


_DCT = _cosines()


def fingerprint(image: np.ndarray) -> tuple[int, np.ndarray]:
    """Hash and means of an image.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        64 bits, and uint8 [GRID * GRID * 3].
    """
    picture = Image.fromarray(image)
    small = np.asarray(picture.resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float64)
    gray = small @ (0.299, 0.587, 0.114)
    waves = (_DCT @ gray @ _DCT.T).reshape(-1)
    waves[0] = waves[1:].mean()  # the mean of the image says nothing of its structure: replaced
    bits = np.where(np.abs(waves) < 1e-6, False, waves > np.median(waves[1:]))  # of a flat image: no bit, not noise
    cells = small.reshape(GRID, _SIDE // GRID, GRID, _SIDE // GRID, 3).mean((1, 3))
    return int.from_bytes(np.packbits(bits).tobytes(), "big"), np.rint(cells).astype(np.uint8).reshape(-1)


def read_small(data: bytes, decoder: str) -> np.ndarray:
    """An encoded image as uint8 [H, W, 3], at a reduced size where its format makes that cheap.

    Args:
        data: the file's bytes.
        decoder: what decoded it when it was checked (manifest); what DALI decodes, Pillow or rasterio reads here.

    Raises:
        Exception: whatever the libraries raise.
    """
    if decoder != "rasterio":
        try:
            with Image.open(io.BytesIO(data)) as opened:
                if opened.format == "JPEG" and opened.mode in ("RGB", "L"):
                    opened.draft("RGB", (_DRAFT, _DRAFT))
                    return np.asarray(opened.convert("RGB"))
            return _stretched(data, "pillow")
        except Exception:
            if decoder == "pillow":
                raise
    return _stretched(data, "rasterio")


def _stretched(data: bytes, decoder: str) -> np.ndarray:
    """8 bits as they are, others from their least to their greatest value: 12 bits in 16 would leave 16 levels."""
    raster = decode.read(data, decoder, 3)
    if raster.bands.dtype not in (np.uint8, np.bool_):
        raster = replace(raster, bands=raster.bands.astype(np.float64))
    return Scaling()(raster)
