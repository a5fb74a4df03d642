"""Ops `pera::contrast_mean` and `pera::visible_patches`: schema, fake, autograd, dispatch.

    rows = (color(crops / largest)[visible patches] - mean) / std       largest: 255 for uint8 crops, 65535 for uint16

Colours are torchvision's `adjust_*` on float images in [0, 1], applied in each crop's own order.
Source: docs/method.md section 2.3.
Only the pixels of visible patches are coloured; contrast needs one number of the whole crop: `contrast_mean`.

Operation codes: 0 brightness, 1 contrast, 2 saturation, 3 hue, 4 grayscale; any other (-1) nothing. An order holds each
at most once.
Brightness and contrast act on all channels; saturation, hue and grayscale on the red, green and blue channel. `rgb`
tells which these are: three distinct numbers, or [] for images without colours, which are then left alone; None: the
three channels of three, else []. The gray that contrast blends with is luma if there is nothing but RGB, else the mean
over all channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from pera_kernels import backend, cost

from . import eager, reference
from .arguments import Patches

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

for _name in ("contrast_mean", "visible_patches"):
    backend.register(_name, "triton", available=backend.needs_triton)
    backend.register(_name, "native", available=backend.needs_native(_name))
    backend.register(_name, "eager")


def check_colors(
    crops: Tensor,
    order: Tensor | None,
    factors: Tensor | None,
    gray_mean: Tensor | None,
    rgb: Sequence[int] | None,
) -> None:
    """Raises TypeError or ValueError, naming the argument, unless the colour arguments fit uint8 or uint16 `crops`."""
    count = crops.shape[0]
    if rgb is not None and reference.is_raw(crops):
        channels = crops.shape[3]
        if len(rgb) not in (0, 3) or len(set(rgb)) != len(rgb) or not all(0 <= number < channels for number in rgb):
            raise ValueError(f"rgb must be three distinct numbers below {channels} or [], got {list(rgb)}")
    if (order is None) != (factors is None):
        raise ValueError("order and factors come together: give both or neither")
    if order is None or factors is None:
        if gray_mean is not None:
            raise ValueError("gray_mean is of use only with order and factors")
        return
    if not reference.is_raw(crops):
        raise ValueError(f"order must be None for {crops.dtype} crops: float crops are taken as normalised views")
    if order.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"order must be int32 or int64, got {order.dtype}")
    if not factors.is_floating_point():
        raise TypeError(f"factors must be floating point, got {factors.dtype}")
    for name, value in (("order", order), ("factors", factors)):
        if tuple(value.shape) != (count, 4):
            raise ValueError(f"{name} must be [{count}, 4] for {count} crops, got {list(value.shape)}")
        if value.device != crops.device:
            raise ValueError(f"{name} is on {value.device}, crops are on {crops.device}")
    if gray_mean is not None:
        if not gray_mean.is_floating_point():
            raise TypeError(f"gray_mean must be floating point, got {gray_mean.dtype}")
        if tuple(gray_mean.shape) != (count,):
            raise ValueError(f"gray_mean must be [{count}] for {count} crops, got {list(gray_mean.shape)}")
        if gray_mean.device != crops.device:
            raise ValueError(f"gray_mean is on {gray_mean.device}, crops are on {crops.device}")


def check_patches(crops: Tensor, index: Tensor, mean: Sequence[float], std: Sequence[float], patch_size: int) -> int:
    """Raises TypeError or ValueError, naming the argument, unless these fit together; returns C."""
    if crops.dim() != 4:
        raise ValueError(f"crops must be uint8 or uint16 [N, H, W, C] or float [N, C, H, W], got {list(crops.shape)}")
    if reference.is_raw(crops):
        _, height, width, channels = crops.shape
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != channels:
                raise ValueError(f"{name} must have a value for each of {channels} channels, got {len(values)}")
        if not all(value > 0 for value in std):
            raise ValueError(f"std must be positive, got {list(std)}")
    elif crops.is_floating_point():
        _, channels, height, width = crops.shape
    else:
        raise TypeError(f"crops must be uint8, uint16 or floating point, got {crops.dtype}")
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")
    if min(height, width, channels) < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"crops must be whole patches of {patch_size}x{patch_size} pixels, got {list(crops.shape)}")
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"index must be int32 or int64, got {index.dtype}")
    if index.dim() != 2 or index.shape[0] != crops.shape[0]:
        raise ValueError(f"index must be [{crops.shape[0]}, n] for {crops.shape[0]} crops, got {list(index.shape)}")
    if index.device != crops.device:
        raise ValueError(f"index is on {index.device}, crops are on {crops.device}")
    return channels


def check_index(crops: Tensor, index: Tensor, patch_size: int) -> None:
    """On the CPU, where looking costs nothing: raises ValueError for patch numbers outside the grid.

    Fake tensors have no values. The native kernels look by themselves.
    """
    if index.device.type != "cpu" or index.numel() == 0 or is_fake(index):
        return
    height, width = crops.shape[1:3] if reference.is_raw(crops) else crops.shape[2:4]
    patches = (height // patch_size) * (width // patch_size)
    low, high = (int(value) for value in index.aminmax())
    if low < 0 or high >= patches:
        raise ValueError(f"index must be in [0, {patches}), got values from {low} to {high}")


def _check_whole_crops(crops: Tensor, order: Tensor, factors: Tensor, rgb: Sequence[int] | None) -> None:
    if not reference.is_raw(crops):
        raise TypeError(f"crops must be uint8 or uint16, got {crops.dtype}")
    if crops.dim() != 4 or min(crops.shape[1:]) < 1:
        raise ValueError(f"crops must be [N, H, W, C] with pixels in it, got {list(crops.shape)}")
    check_colors(crops, order, factors, None, rgb)


@torch.library.custom_op("pera::contrast_mean", mutates_args=())
def contrast_mean(crops: Tensor, order: Tensor, factors: Tensor, rgb: Sequence[int] | None = None) -> Tensor:
    """Mean gray of each crop at the point of its order where contrast comes.

    Args:
        crops: uint8 or uint16 [N, H, W, C].
        order: int32 or int64 [N, 4], operation codes, applied left to right.
        factors: float [N, 4], the factor of operation code k at [:, k]: brightness, contrast, saturation, hue (turns).
        rgb: numbers of the red, green and blue channel; see the top of this file.

    Returns:
        float32 [N], in [0, 1]; 0 for crops whose order does not hold contrast. No gradient. Deterministic.

    Raises:
        TypeError, ValueError: an argument of another type or shape; the message names it.
    """
    _check_whole_crops(crops, order, factors, rgb)
    match choose("contrast_mean", crops):
        case "triton":
            from . import triton

            return triton.contrast_mean(crops, order, factors, rgb)
        case "native":
            return torch.ops.pera_native.contrast_mean(crops, order, factors, **given(rgb))
        case "eager":
            return eager.contrast_mean(crops, order, factors, rgb=rgb)
        case _:
            return reference.contrast_mean(crops, order, factors, rgb=rgb)


@contrast_mean.register_fake
def _(crops: Tensor, order: Tensor, factors: Tensor, rgb: Sequence[int] | None = None) -> Tensor:
    _check_whole_crops(crops, order, factors, rgb)
    return crops.new_empty(crops.shape[0], dtype=torch.float32)


@torch.library.custom_op("pera::visible_patches", mutates_args=())
def visible_patches(
    crops: Tensor,
    index: Tensor,
    order: Tensor | None,
    factors: Tensor | None,
    gray_mean: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int,
    dtype: torch.dtype,
    rgb: Sequence[int] | None = None,
) -> Tensor:
    """Rows of the visible patches: coloured, normalised, unfolded.

    Args:
        crops: uint8 or uint16 [N, H, W, C], scaled by 1/255 or 1/65535, coloured, normalised; or float [N, C, H, W],
            taken as views that are normalised already (order, factors and gray_mean must be None; mean and std are not
            used). Any strides.
        index: int32 or int64 [N, n], patch numbers in raster order. On the CPU numbers outside the grid raise; on other
            devices they are not looked at (that would wait for the device), and what comes of them is undefined.
        order: int32 or int64 [N, 4], operation codes; None: no colour.
        factors: float [N, 4], see `contrast_mean`.
        gray_mean: float [N], what `contrast_mean` gave; None: computed here.
        mean, std: a float for each channel.
        patch_size: P; H and W are multiples of it.
        dtype: of the rows; float64 computes in float64, all others in float32.
        rgb: see `contrast_mean`.

    Returns:
        `dtype` [N*n, C*P*P], crop after crop in the order of `index`; elements in order (channel, row, column), as the
        weight of a patch projection has them. No gradient reaches any argument: pixels are data. Asking for one raises.
        Deterministic.

    Raises:
        TypeError, ValueError: an argument of another type or shape; the message names it.
    """
    patches = Patches(crops, index, order, factors, gray_mean, mean, std, patch_size, rgb)
    _check(patches, dtype)
    chosen = choose("visible_patches", crops)
    patches = with_gray_mean(patches, dtype)
    if chosen == "native" and runs_native(crops, dtype):
        return torch.ops.pera_native.visible_patches(*patches[:-1], dtype, **given(rgb))
    check_index(crops, index, patch_size)
    if chosen == "reference":
        return reference.visible_patches(*patches[:-1], dtype, rgb)
    if chosen == "triton":
        from . import triton

        if triton.why_not(crops, patch_size, dtype) is None:
            return triton.visible_patches(patches, dtype)
    return eager.visible_patches(patches, dtype)


def with_gray_mean(patches: Patches, dtype: torch.dtype) -> Patches:
    """The same with the gray mean, where contrast may want it; in float64 the implementations compute their own."""
    crops, _, order, factors, gray_mean, *_ = patches
    if order is None or factors is None or gray_mean is not None or dtype == torch.float64:
        return patches
    return patches._replace(gray_mean=torch.ops.pera.contrast_mean(crops, order, factors, patches.rgb))


def choose(op: str, crops: Tensor) -> str:
    """`backend.choose`; but fake tensors, which only PyTorch's own operations know, run eager."""
    chosen = backend.choose(op, crops.device)
    return "eager" if is_fake(crops) else chosen


def given(rgb: Sequence[int] | None) -> dict[str, Sequence[int]]:
    """`rgb` as an argument of the native ops, left out where it is not given: their default is the same."""
    return {} if rgb is None else {"rgb": rgb}


def runs_native(crops: Tensor, dtype: torch.dtype) -> bool:
    """Whether the native kernels take these crops and give rows of this dtype; eager PyTorch does the others."""
    return dtype in NATIVE_DTYPES and (reference.is_raw(crops) or crops.dtype in NATIVE_DTYPES)


def check(patches: Patches) -> int:
    """Raises TypeError or ValueError, naming the argument, unless the arguments fit together; returns C."""
    crops, index, order, factors, gray_mean, mean, std, patch_size, rgb = patches
    channels = check_patches(crops, index, mean, std, patch_size)
    check_colors(crops, order, factors, gray_mean, rgb)
    return channels


def _check(patches: Patches, dtype: torch.dtype) -> int:
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}")
    return check(patches)


@visible_patches.register_fake
def _(crops, index, order, factors, gray_mean, mean, std, patch_size, dtype, rgb=None):
    channels = _check(Patches(crops, index, order, factors, gray_mean, mean, std, patch_size, rgb), dtype)
    return crops.new_empty(index.shape[0] * index.shape[1], channels * patch_size**2, dtype=dtype)


@cost.of("pera::contrast_mean")
def _contrast_cost(_result, crops, *_rest):
    return [cost.Cost(bytes=cost.size(crops)), cost.Cost()] if crops.numel() else []  # per tile, then their sums


@cost.of("pera::visible_patches")
def _(result, crops, _index, order, _factors, gray_mean, *_rest):
    if not result.numel():
        return []
    pixels = result.numel() * crops.element_size()  # a value of a row is one of the crop
    mean = _contrast_cost(None, crops) if order is not None and gray_mean is None else []
    return [*mean, cost.Cost(bytes=cost.size(result) + pixels)]


def _no_gradient(ctx, grad):
    raise RuntimeError("visible_patches and contrast_mean have no gradient: detach crops, factors and gray_mean")


contrast_mean.register_autograd(_no_gradient)
visible_patches.register_autograd(_no_gradient)
