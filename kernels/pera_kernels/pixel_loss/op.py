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
from pera_kernels.visible_patches.op import check_colors, check_index, check_patches, choose, given, runs_native
from pera_kernels.visible_patches.reference import compute_dtype

from . import eager, reference

backend.register("pixel_loss", "triton", available=backend.needs_triton)
backend.register("pixel_loss", "native", available=backend.needs_native("pixel_loss", "pixel_loss_backward"))
backend.register("pixel_loss", "eager")


def _check(
    pred: Tensor,
    crops: Tensor,
    index: Tensor,
    order: Tensor | None,
    factors: Tensor | None,
    gray_mean: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int,
    rgb: Sequence[int] | None,
) -> None:
    channels = check_patches(crops, index, mean, std, patch_size)
    check_colors(crops, order, factors, gray_mean, rgb)
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
    _check(pred, crops, index, order, factors, gray_mean, mean, std, patch_size, rgb)
    run = _implementation(pred, crops, patch_size)
    gray_mean = _gray_mean(pred, crops, order, factors, gray_mean, rgb)
    if run is not torch.ops.pera_native:
        check_index(crops, index, patch_size)
    return run.pixel_loss(pred, crops, index, order, factors, gray_mean, mean, std, patch_size, **given(rgb))


def _implementation(pred: Tensor, crops: Tensor, patch_size: int) -> Any:
    """What has the functions pixel_loss and pixel_loss_backward that take these arguments."""
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


def _gray_mean(
    pred: Tensor,
    crops: Tensor,
    order: Tensor | None,
    factors: Tensor | None,
    gray_mean: Tensor | None,
    rgb: Sequence[int] | None,
) -> Tensor | None:
    """gray_mean, computed where contrast may want it; in float64 the implementations compute their own."""
    if order is None or factors is None or gray_mean is not None or pred.dtype == torch.float64:
        return gray_mean
    return torch.ops.pera.contrast_mean(crops, order, factors, rgb)


@pixel_loss.register_fake
def _(pred, crops, index, order, factors, gray_mean, mean, std, patch_size, rgb=None):
    _check(pred, crops, index, order, factors, gray_mean, mean, std, patch_size, rgb)
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
    run = _implementation(pred, crops, patch_size)
    gray_mean = _gray_mean(pred, crops, order, factors, gray_mean, rgb)
    where = (crops, index, order, factors, gray_mean, mean, std, patch_size)
    return run.pixel_loss_backward(grad, pred, *where, **given(rgb))


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
