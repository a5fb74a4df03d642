"""Crops on the CPU, several times as fast there as DALI's: PyTorch's antialiased resize for RGB and gray of 8 bits,
whose kernel is made for that, and `pera_kernels.crop_resize` for more bands or bits.

As torchvision does for the published code, a window is cut out first and then resized: the filter reads nothing beyond
the window. (On a GPU DALI resizes, and reads the image's own pixels there: a crop's outermost pixels differ.)
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.nn.functional import interpolate

from pera_kernels.crop_resize import crop_resize

_PLAIN = (1, 3)  # channels
_GRAIN = 32768  # elements from which on PyTorch's elementwise operations use several threads


class HostCropper:
    """Crops of decoded images, made by threads.

    Args:
        sides: pixels a side of each crop of an image.
        threads: how many images are worked on at a time.
    """

    def __init__(self, sides: Sequence[int], threads: int):
        self._sides = list(sides)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pera-crop")

    def __call__(
        self, images: Sequence[np.ndarray], start: np.ndarray, end: np.ndarray, out: Sequence[torch.Tensor]
    ) -> None:
        """Fills `out`.

        Args:
            images: B decoded images, uint8 or uint16 [H, W, C].
            start: [crops, B, 2], corner of each window that becomes the crop's first pixel, (y, x).
            end: [crops, B, 2], the opposite corner; before `start` along an axis: a flip.
            out: for each crop [B, side, side, C], of the same type.
        """
        starts, ends = (corner.round().astype(np.int64).tolist() for corner in (start, end))  # plain numbers are faster
        results = [crop.numpy() for crop in out]

        sides = self._sides

        def work(slot: int) -> None:
            for crop, side in enumerate(sides):
                _crop(images[slot], starts[crop][slot], ends[crop][slot], side, results[crop][slot])

        for _ in self._pool.map(work, range(len(images))):
            pass

    def __del__(self) -> None:
        self._pool.shutdown()


def _crop(image: np.ndarray, start: list[int], end: list[int], side: int, out: np.ndarray) -> None:
    (top, bottom), (left, right) = (sorted(axis) for axis in zip(start, end, strict=True))
    window = torch.from_numpy(image[top:bottom, left:right])
    if window.dtype != torch.uint8 or window.shape[2] not in _PLAIN:
        crop_resize(window, start[0] > end[0], start[1] > end[1], torch.from_numpy(out))
        return
    # Unsqueezed first, permuted then: its strides say channels-last, which is what the fast path looks for.
    resized = interpolate(window[None].permute(0, 3, 1, 2), size=(side, side), mode="bilinear", antialias=True)
    pixels = resized[0].permute(1, 2, 0)
    if start[0] > end[0]:
        out = out[::-1]
    if start[1] > end[1]:
        _mirror(pixels, out)
    else:
        out[...] = pixels.numpy()


def _mirror(pixels: torch.Tensor, out: np.ndarray) -> None:
    """Left and right exchanged, in pieces that PyTorch does not share out to a team of threads for each of ours."""
    rows = max(1, (_GRAIN - 1) // pixels[0].numel())
    for top in range(0, len(out), rows):
        out[top : top + rows] = pixels[top : top + rows].flip(1).numpy()
