"""pera::add_norm_fp8_: schema, shapes, implementations."""

import torch
from torch import Tensor

from .. import backend, cost, fp8
from ..add_norm import add_norm_
from ..packing import HALF_OR_SINGLE
from ..quantize_rows import quantize_rows
from ..sequence_norm import sequence_norm
from . import reference

backend.register("add_norm_fp8", "triton", available=fp8.needs_triton)
backend.register("add_norm_fp8", "composed")  # of add_norm or sequence_norm, and quantize_rows


@torch.library.custom_op("pera::add_norm_fp8_", mutates_args=("x",))
def _add_norm_fp8(
    x: Tensor, y: Tensor | None, y_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    name = backend.choose("add_norm_fp8", x.device)
    if name == "triton" and x.is_contiguous() and x.dtype in HALF_OR_SINGLE:
        from . import triton

        if triton.why_not(x) is None:
            return triton.add_norm_fp8_(x, y, y_bias, weight, bias, eps)
    if name == backend.REFERENCE:
        stream, values, scale = reference.add_norm_fp8(x, y, y_bias, weight, bias, eps)
        if y is not None:
            x.copy_(stream)
        return values, scale.float()
    groups = [x.shape[0], 1]
    if y is None:
        normed = sequence_norm(x, weight, bias, eps, groups)
    else:
        normed = add_norm_(x, y, y_bias, weight, bias, eps, groups)
    values, scale = quantize_rows(normed)
    return values, scale


@_add_norm_fp8.register_fake
def _(x, y, y_bias, weight, bias, eps):
    return x.new_empty(x.shape, dtype=fp8.E4M3), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@cost.of("pera::add_norm_fp8_")
def _(result, x, y, *_rest):
    return [cost.Cost(bytes=cost.size(x, result) + (0 if y is None else cost.size(x, y)))]


def add_norm_fp8_(
    x: Tensor, y: Tensor | None, y_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> fp8.Rows:
    """Add ``y + y_bias`` to x in place and return the LayerNorm of the sum in FP8; not differentiable.

    Args:
        x: packed tokens [T, D], float dtype; overwritten by the sum.
        y: a branch's result [T, D], dtype of x; None: x is the sum already, and stays as it is.
        y_bias: bias of the branch's last layer [D], any float dtype; None: y has it already.
        weight, bias: scale and shift of the norm [D].
        eps: added to the variance.

    Returns:
        values [T, D] in e4m3 and scale [T, 1], as ``quantize_rows`` says.

    Raises:
        ValueError: x and y do not fit together, or there is a bias without y.
    """
    if x.ndim != 2 or not x.shape[1] or (y is not None and y.shape != x.shape):
        raise ValueError(f"add_norm_fp8: x {tuple(x.shape)} and y {y if y is None else tuple(y.shape)} do not fit")
    if y is None and y_bias is not None:
        raise ValueError("add_norm_fp8: y_bias belongs to y, and there is none")
    return fp8.Rows(*_add_norm_fp8(x, y, y_bias, weight, bias, eps))
