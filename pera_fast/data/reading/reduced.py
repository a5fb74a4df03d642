"""Decodes JPEG files at 1/2, 1/4 or 1/8 of their size where all crops of a sample are smaller still.

libjpeg then transforms the low frequencies of each block of 8 x 8 pixels only: one pixel for 2 x 2, 4 x 4 or 8 x 8 of
the image, exactly, with what a crop of that size could not show left out. The crops are drawn by key, so it is known
before the file is decoded how much of it they need.
"""

import io
import logging
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pera_fast.config.tree import ViewsConfig
from pera_fast.data.sampling.views import draw_windows

_log = logging.getLogger("pera_fast")
FACTORS = (8, 4, 2)
_ORIENTATION = 0x0112
_Turn = Image.Transpose
_UPRIGHT = {
    2: _Turn.FLIP_LEFT_RIGHT,
    3: _Turn.ROTATE_180,
    4: _Turn.FLIP_TOP_BOTTOM,
    5: _Turn.TRANSPOSE,
    6: _Turn.ROTATE_270,
    7: _Turn.TRANSVERSE,
    8: _Turn.ROTATE_90,
}
_Y_REVERSED, _X_REVERSED = (3, 4, 7, 8), (2, 3, 6, 7)  # axes of the upright image that run against the stored one's


@dataclass
class ReducedImage:
    """An image that was decoded at 1 / factor of its size; y of the full image is y / factor + shift[0] here."""

    pixels: np.ndarray  # uint8 [H, W, C], upright
    factor: int
    shift: tuple[float, float]  # (y, x): an edge that factor does not divide lies at the beginning in a turned image


class ReducedDecoder:
    """Decodes JPEG files at the smallest size that a sample's crops allow. Thread-safe.

    Args:
        views: cfg.views.
        seed: the run's seed.
        channels: 3 for RGB, 1 for gray.
        gap: how many times a crop's side its window must still have in the smaller image, along both axes.
    """

    def __init__(self, views: ViewsConfig, seed: int, channels: int, gap: float):
        self._views, self._seed, self._channels = views, seed, channels
        sides = [views.global_size] * views.num_global + [views.local_size] * views.num_local
        self._needed = gap * np.array(sides)

    def factor(self, epoch: int, sample: int, height: int, width: int) -> int:
        """Largest reduction of an image of that size that the sample's crops allow: 1, 2, 4 or 8."""
        if min(height, width) < 2 * self._needed.max():
            return 1
        windows = draw_windows(self._views, self._seed, epoch, np.array([sample]), np.array([[height, width]]))
        room = (np.minimum(windows.height, windows.width)[:, 0] / self._needed).min()
        return next((factor for factor in FACTORS if factor <= room), 1)

    def __call__(self, data: bytes, epoch: int, sample: int, height: int, width: int) -> ReducedImage | None:
        """The image, or None where it must be decoded in full.

        Args:
            data: the JPEG file.
            epoch: of the draws.
            sample: row id of the draws.
            height, width: of the whole image, upright.
        """
        factor = self.factor(epoch, sample, height, width)
        if factor == 1:
            return None
        try:
            return decode_reduced(data, height, width, factor, self._channels)
        except Exception as error:  # whatever it is, the full decode has been checked and knows better
            _log.debug("sample %d is decoded in full: %s", sample, error)
            return None


def decode_reduced(data: bytes, height: int, width: int, factor: int, channels: int) -> ReducedImage:
    """The image at 1 / factor of its size; arguments as of `ReducedDecoder`.

    Raises whatever Pillow raises; ValueError if the result could differ from that of the full decode.
    """
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        exif = Image.Exif()  # not image.getexif(), which looks for the orientation in other places too
        exif.load(image.info.get("exif", b""))
        orientation = exif.get(_ORIENTATION, 1)
        stored = (height, width) if orientation in (5, 6, 7, 8) else (width, height)
        if image.size != stored or image.mode not in ("RGB", "L"):
            raise ValueError(f"{image.mode} {image.size}, not RGB or L {stored}")
        image.draft("L" if channels == 1 else image.mode, (stored[0] // factor, stored[1] // factor))
        if image.size != tuple(math.ceil(side / factor) for side in stored):
            raise ValueError(f"{image.size} is not a {factor}th of {stored}")
        upright = image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
        pixels = np.array(upright if upright.mode == ("L" if channels == 1 else "RGB") else upright.convert("RGB"))
    if channels == 1:
        pixels = pixels[..., None]
    shift = (
        math.ceil(height / factor) - height / factor if orientation in _Y_REVERSED else 0.0,
        math.ceil(width / factor) - width / factor if orientation in _X_REVERSED else 0.0,
    )
    return ReducedImage(pixels, factor, shift)
