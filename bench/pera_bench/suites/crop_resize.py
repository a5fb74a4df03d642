"""All crops of the images from decoded ones, on the CPU: what the loader does for many bands or 16 bits.

What it is held against is PyTorch's resize, which the loader would use; the definition, two dense products in float64,
is no alternative for anyone.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pera_bench.point import Point, nbytes
from pera_bench.work import Cost, Unavailable, Whole
from pera_fast.data.sampling.views import draw_windows
from pera_kernels.crop_resize import crop_resize

IMPLEMENTATIONS = ("reference", "pera-fast")
CASES = {"6_bands_16_bit": ("forward",), "8_bands_8_bit": ("forward",)}
SIDE = 512  # pixels of the images
_GROUP = 4  # channels for which PyTorch's uint8 kernel is fast


def make(point: Point, case: str) -> Whole:
    """Windows read, crops written."""
    if point.device.type != "cpu":
        raise Unavailable("these crops are made on a CPU; on a GPU DALI makes them")
    bands, bits = int(case.split("_")[0]), int(case.split("_")[2])
    dtype = torch.uint16 if bits == 16 else torch.uint8
    draw = np.random.default_rng(0)
    shape = (point.images, SIDE, SIDE, bands)
    images = torch.from_numpy(draw.integers(0, 2**bits, shape, np.uint16).astype(f"u{bits // 8}"))
    v = point.cfg.views
    windows = draw_windows(v, 0, 0, np.arange(point.images), np.full((point.images, 2), SIDE))
    sides = [v.global_size] * v.num_global + [v.local_size] * v.num_local
    work = []
    for crop, side in enumerate(sides):
        for number, image in enumerate(images):
            top, left, height, width, hflip, vflip = (
                getattr(windows, name)[crop, number] for name in ("top", "left", "height", "width", "hflip", "vflip")
            )
            window = image[top : top + height, left : left + width]
            work.append((window, bool(vflip), bool(hflip), torch.empty(side, side, bands, dtype=dtype)))

    def all_by(crop: Callable[[Tensor, bool, bool, Tensor], None]) -> Callable[[], None]:
        def call() -> None:
            for arguments in work:
                crop(*arguments)

        return call

    return Whole(
        {
            "reference": lambda: all_by(by_torch),
            "pera-fast": lambda: all_by(crop_resize),
        },
        Cost(moved=sum(nbytes(window, out) for window, _, _, out in work)),
    )


def by_torch(window: Tensor, flip_y: bool, flip_x: bool, out: Tensor) -> None:
    """With PyTorch's antialiased resize: of bytes some channels at a time, of 16 bits in float32."""
    flips = [axis for axis, flip in ((0, flip_y), (1, flip_x)) if flip]
    planes = window.permute(2, 0, 1)[None]
    how = {"size": out.shape[:2], "mode": "bilinear", "antialias": True}
    if window.dtype == torch.uint8:
        crop = torch.cat([interpolate(part, **how) for part in planes.split(_GROUP, 1)], 1)
    else:
        crop = interpolate(planes.to(torch.float32), **how).round_()
    crop = crop[0].permute(1, 2, 0)
    out.copy_(crop.flip(flips) if flips else crop)
