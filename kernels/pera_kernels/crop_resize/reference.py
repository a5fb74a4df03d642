"""Definition of `crop_resize`: two products with matrices of weights, in float64."""

import torch
from torch import Tensor


def weights(window: int, side: int) -> Tensor:
    """float64 [side, window]: how much of each of the window's pixels goes into each of the crop's, along one axis.

    A triangle about the crop's pixel, twice as wide as that is in the window, but never narrower than two of the
    window's pixels; cut off at the window's borders, and normalised.
    """
    scale = window / side
    reach = max(scale, 1.0)
    center = scale * (torch.arange(side, dtype=torch.float64) + 0.5)
    distance = torch.arange(window, dtype=torch.float64) + 0.5 - center[:, None]
    triangle = (1 - distance.abs() / reach).clamp(min=0)
    return triangle / triangle.sum(1, keepdim=True)


def crop_resize(window: Tensor, flip_y: bool, flip_x: bool, out: Tensor) -> None:
    """See dispatch.py."""
    height, width = out.shape[:2]
    down, across = weights(window.shape[0], height), weights(window.shape[1], width)
    down, across = down.flip(0) if flip_y else down, across.flip(0) if flip_x else across
    lines = down @ window.to(torch.float64).flatten(1)  # [height, W * C]
    crop = across @ lines.unflatten(1, window.shape[1:])  # [height, width, C]
    out.copy_((crop + 0.5).floor())
