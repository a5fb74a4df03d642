"""`crop_resize`: dispatch. The maths and the costs: README.md beside this.

The loader's threads call it, on plain tensors and outside of any graph, and it fills memory that it is given: it is no
custom operator, and nothing has a gradient.
"""

import torch
from torch import Tensor

from pera_kernels import backend

from . import reference

backend.register("crop_resize", "native", available=backend.needs_native("crop_resize", "crops_of_image"))

_CPU = torch.device("cpu")
_DTYPES = (torch.uint8, torch.uint16)


def crop_resize(window: Tensor, flip_y: bool, flip_x: bool, out: Tensor) -> None:
    """Fills a crop with a window of an image: bilinear with antialias, reading nothing beyond the window.

    Args:
        window: uint8 or uint16 [H, W, C] on the CPU with pixels in it; a view into an image, whose lines may be longer.
        flip_y, flip_x: whether the crop is turned upside down, left side right.
        out: of the same type [height, width, C]; written. Exact to the rounding of float32: a value differs from the
            definition's by 1 at most, where that lies half-way between two integers.

    Raises:
        TypeError, ValueError: an argument of another type or shape, or the values of a line do not lie one after the
            other in memory; the message says which.
    """
    if window.dtype not in _DTYPES or out.dtype != window.dtype:
        raise TypeError(f"window and out must both be uint8 or both uint16, got {window.dtype} and {out.dtype}")
    if window.dim() != 3 or out.dim() != 3 or window.shape[2] != out.shape[2]:
        raise ValueError(f"window and out must be [H, W, C], got {list(window.shape)} and {list(out.shape)}")
    if window.numel() == 0:
        raise ValueError(f"the window must hold pixels, got {list(window.shape)}")
    for image in (window, out):
        if image.stride()[1:] != (image.shape[2], 1):
            raise ValueError(f"the values of a line must lie one after the other, got strides {image.stride()}")
    if backend.choose("crop_resize", _CPU) == "native":
        torch.ops.pera_native.crop_resize(window, flip_y, flip_x, out)
    else:
        reference.crop_resize(window, flip_y, flip_x, out)


def crops_of_image(image: Tensor, start: Tensor, end: Tensor, slot: int, out: Tensor) -> None:
    """Fills all crops of one size of an image in one call, during which Python's other threads run.

    RGB and gray of 8 bits are resized by PyTorch's `interpolate(mode="bilinear", antialias=True)`, to the bit: its
    uint8 kernel is made for that. Anything else is resized as `crop_resize` does.

    Args:
        image: uint8 or uint16 [H, W, C] on the CPU, the values of a line one after the other in memory.
        start: int64 [crops, images, 2], the corner of each window that becomes the crop's first pixel, (y, x).
        end: int64 [crops, images, 2], the opposite corner; before `start` along an axis: a flip.
        slot: which of the images this is.
        out: of the image's type [crops, images, side, side, C], without gaps; [:, slot] is written.

    Raises:
        ValueError, IndexError: an argument of another type or shape, or a window with no pixel of the image (one that
            only reaches beyond it is cut off); the message says which.
    """
    if backend.choose("crop_resize", _CPU) == "native":
        torch.ops.pera_native.crops_of_image.default(image, start, end, slot, out)
    else:
        reference.crops_of_image(image, start, end, slot, out)
