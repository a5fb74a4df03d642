"""Op `pera::pixel_loss`: schema, fake, autograd, dispatch.

    loss = 1/R * sum over rows r, values i of (pred[r, i] - target[r, i])^2
    d loss / d pred = 2/R * (pred - target)

The target is the normalised student view's own pixels, read from the integer crop chunk by chunk: neither the view nor
the target is ever in memory, and the backward reads them again (docs/method.md sections 4.7 and 5.4).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pera_kernels import backend, cost
from pera_kernels.visible_patches.arguments import Patches
from pera_kernels.visible_patches.op import check, check_index, choose, given, runs_native, with_gray_mean
from pera_kernels.visible_patches.reference import compute_dtype

from . import eager, reference

backend.register("pixel_loss", "triton", available=backend.needs_triton)
backend.register("pixel_loss", "native", available=backend.needs_native("pixel_loss", "pixel_loss_backward"))
backend.register("pixel_loss", "eager")


def _check(pred: Tensor, patches: Patches) -> None:
    channels = check(patches)
    crops, index, patch_size = patches.crops, patches.index, patches.patch_size
    if not pred.is_floating_point():
        raise TypeError(f"pred must be floating point, got {pred.dtype}")
    shape = (index.shape[0] * index.shape[1], patch_size**2 * channels)
    if tuple(pred.shape) != shape:
        raise ValueError(f"pred must be {list(shape)} for {list(index.shape)} patches, got {list(pred.shape)}")
    if pred.device != crops.device:
        raise ValueError(f"pred is on {pred.device}, crops are on {crops.device}")


@torch.library.custom_op("pera::pixel_loss", mutates_args=())
def pixel_loss(
    pred: Tensor,
    crops: Tensor,
    index: Tensor,
    order: Tensor | None,
    factors: Tensor | None,
    gray_mean: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int,
    rgb: Sequence[int] | None = None,
) -> Tensor:
    """Squared error of predicted patches: summed over a patch's values, mean over all rows.

    Args:
        pred: float [N*n, P*P*C], crop after crop in the order of `index`; elements in order (row, column, channel).
        crops, index, order, factors, gray_mean, mean, std, patch_size, rgb: as `visible_patches` takes them, of the
            view that is predicted (the student's) and the patches that are.

    Returns:
        float32 [] (float64 for float64 `pred`), accumulated in that precision; 0 with a gradient of zeros if there are
        no rows. Gradient for `pred` only, of its dtype. Deterministic.

    Raises:
        TypeError, ValueError: an argument of another type or shape; the message names it.
    """
    patches = Patches(crops, index, order, factors, gray_mean, mean, std, patch_size, rgb)
    _check(pred, patches)
    run = _implementation(pred, patches)
    patches = with_gray_mean(patches, pred.dtype)
    if run is not torch.ops.pera_native:
        check_index(crops, index, patch_size)
    where, colours = _passed(run, patches)
    return run.pixel_loss(pred, *where, **colours)


def _implementation(pred: Tensor, patches: Patches) -> Any:
    """Module with functions pixel_loss and pixel_loss_backward for these arguments."""
    crops, patch_size = patches.crops, patches.patch_size
    match choose("pixel_loss", crops):
        case "triton":
            from . import triton

            if triton.why_not(pred, crops, patch_size) is None:
                return triton
        case "native" if runs_native(crops, pred.dtype):
            return torch.ops.pera_native
        case "reference":
            return reference
    return eager


def _passed(run: Any, patches: Patches) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Patches as an implementation takes them: the native library and the definition have the op's own arguments."""
    if run is torch.ops.pera_native or run is reference:
        return patches[:-1], given(patches.rgb)
    return (patches,), {}


@pixel_loss.register_fake
def _(pred, crops, index, order, factors, gray_mean, mean, std, patch_size, rgb=None):
    _check(pred, Patches(crops, index, order, factors, gray_mean, mean, std, patch_size, rgb))
    return pred.new_empty((), dtype=compute_dtype(pred.dtype))


@torch.library.custom_op("pera::pixel_loss_backward", mutates_args=())
def pixel_loss_backward(
    grad: Tensor,
    pred: Tensor,
    crops: Tensor,
    index: Tensor,
    order: Tensor | None,
    factors: Tensor | None,
    gray_mean: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int,
    rgb: Sequence[int] | None = None,
) -> Tensor:
    """Gradient of `pixel_loss` for `pred`: [N*n, P*P*C] of its dtype; `grad` [] is the loss's own."""
    patches = Patches(crops, index, order, factors, gray_mean, mean, std, patch_size, rgb)
    run = _implementation(pred, patches)
    patches = with_gray_mean(patches, pred.dtype)
    where, colours = _passed(run, patches)
    return run.pixel_loss_backward(grad, pred, *where, **colours)


@pixel_loss_backward.register_fake
def _(grad, pred, crops, index, order, factors, gray_mean, mean, std, patch_size, rgb=None):
    return torch.empty_like(pred, memory_format=torch.contiguous_format)


def _pass_cost(pred: Tensor, crops: Tensor, written: int) -> cost.Cost:
    return cost.Cost(bytes=cost.size(pred) + pred.numel() * crops.element_size() + written)


@cost.of("pera::pixel_loss")
def _(result, pred, crops, *_rest):
    if not pred.numel():
        return [cost.Cost(bytes=cost.size(result))]
    return [_pass_cost(pred, crops, 0), cost.Cost()]


@cost.of("pera::pixel_loss_backward")
def _(result, _grad, pred, crops, *_rest):
    return [_pass_cost(pred, crops, cost.size(result))] if pred.numel() else []


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])  # the arguments themselves: nothing is made for the backward
    ctx.constants = inputs[6:]


def _backward(ctx, grad):
    grad_pred = torch.ops.pera.pixel_loss_backward(grad, *ctx.saved_tensors, *ctx.constants)
    return grad_pred, None, None, None, None, None, None, None, None, None


pixel_loss.register_autograd(_backward, setup_context=_setup_context)
