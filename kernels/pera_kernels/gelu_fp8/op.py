"""pera::gelu_fp8: schema, shapes, implementations."""

import torch
from torch import Tensor

from .. import backend, cost, fp8
from ..gelu import gelu
from ..packing import HALF_OR_SINGLE
from ..quantize_rows import quantize_rows
from . import reference

backend.register("gelu_fp8", "triton", available=fp8.needs_triton)
backend.register("gelu_fp8", "composed")  # of gelu and quantize_rows


@torch.library.custom_op("pera::gelu_fp8", mutates_args=())
def _gelu_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    name = backend.choose("gelu_fp8", x.device)
    if name == "triton" and x.dtype in HALF_OR_SINGLE:
        from . import triton

        if triton.why_not(x) is None:
            return triton.gelu_fp8(x)
    values, scale = reference.gelu_fp8(x) if name == backend.REFERENCE else quantize_rows(gelu(x))
    return values, scale.float()


@_gelu_fp8.register_fake
def _(x):
    return x.new_empty(x.shape, dtype=fp8.E4M3), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@cost.of("pera::gelu_fp8")
def _(result, x):
    return [cost.Cost(bytes=cost.size(x, result))]


def gelu_fp8(x: Tensor) -> fp8.Rows:
    """Exact GELU of a matrix, rounded to e4m3 with a scale a row; not differentiable.

    Args:
        x: [R, C], C at least 1, any float dtype.

    Returns:
        values [R, C] in e4m3 and scale [R, 1], as ``quantize_rows`` says.

    Raises:
        ValueError: x is no matrix with columns.
    """
    if x.ndim != 2 or not x.shape[1]:
        raise ValueError(f"gelu_fp8: wants a matrix with columns, not {tuple(x.shape)}")
    return fp8.Rows(*_gelu_fp8(x))
