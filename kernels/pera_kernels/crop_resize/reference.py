"""Definition of `crop_resize`: two products with matrices of weights, in float64."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

_PLAIN = (1, 3)  # channels
_GRAIN = 32768  # elements from which on PyTorch's elementwise operations use several threads


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


def crops_of_image(image: Tensor, start: Tensor, end: Tensor, slot: int, out: Tensor) -> None:
    """See dispatch.py."""
    for crop, (near, far) in enumerate(zip(start[:, slot].tolist(), end[:, slot].tolist(), strict=True)):
        (top, bottom), (left, right) = (sorted(axis) for axis in zip(near, far, strict=True))
        bottom, right = min(bottom, image.shape[0]), min(right, image.shape[1])
        if not (0 <= top < bottom and 0 <= left < right):
            raise ValueError(f"crop {crop} of image {slot} has no pixel of it")
        window, flips = image[top:bottom, left:right], (near[0] > far[0], near[1] > far[1])
        if image.dtype == torch.uint8 and image.shape[2] in _PLAIN:
            _by_pytorch(window, *flips, out[crop, slot])
        else:
            crop_resize(window, *flips, out[crop, slot])


def _by_pytorch(window: Tensor, flip_y: bool, flip_x: bool, out: Tensor) -> None:
    # Unsqueezed first, permuted then: its strides say channels-last, which is what the fast path looks for.
    resized = interpolate(window[None].permute(0, 3, 1, 2), size=out.shape[:2], mode="bilinear", antialias=True)
    pixels = resized[0].permute(1, 2, 0)
    to = out.numpy()[::-1] if flip_y else out.numpy()
    if not flip_x:
        to[...] = pixels.numpy()
        return
    # In pieces that PyTorch does not share out to a team of threads for each of the caller's.
    rows = max(1, (_GRAIN - 1) // pixels[0].numel())
    for top in range(0, len(to), rows):
        to[top : top + rows] = pixels[top : top + rows].flip(1).numpy()
