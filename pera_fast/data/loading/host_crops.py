"""Crops and resizes images on the CPU, several times as fast as DALI does there.

PyTorch's antialiased resize takes RGB and gray of 8 bits, which its kernel is made for; `pera_kernels.crop_resize`
takes more bands or bits.

As torchvision does for the published code, a window is cut out first and then resized: the filter reads nothing beyond
the window. (On a GPU DALI resizes, and reads the image's own pixels there: a crop's outermost pixels differ.)
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from pera_kernels.crop_resize import crops_of_image


class HostCropper:
    """Crops of decoded images, made by threads.

    Args:
        threads: how many images are worked on at a time.
    """

    def __init__(self, threads: int):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pera-crop")

    def __call__(
        self, images: Sequence[np.ndarray], start: np.ndarray, end: np.ndarray, out: Sequence[torch.Tensor]
    ) -> None:
        """Fills `out`.

        Args:
            images: B decoded images, uint8 or uint16 [H, W, C].
            start: [crops, B, 2], corner of each window that becomes the crop's first pixel, (y, x).
            end: [crops, B, 2], the opposite corner; before `start` along an axis: a flip.
            out: for each size, in the order of the crops, [crops, B, side, side, C] of the same type.
        """
        corners = (torch.from_numpy(corner.round().astype(np.int64)) for corner in (start, end))
        sizes = [len(group) for group in out]
        work = list(zip(*(corner.split(sizes) for corner in corners), out, strict=True))

        def crops(slot: int) -> None:
            # Few calls for an image: after each a thread waits for its turn with the interpreter.
            image = torch.from_numpy(np.ascontiguousarray(images[slot]))
            for starts, ends, group in work:
                crops_of_image(image, starts, ends, slot, group)

        for _ in self._pool.map(crops, range(len(images))):
            pass

    def __del__(self) -> None:
        self._pool.shutdown()
