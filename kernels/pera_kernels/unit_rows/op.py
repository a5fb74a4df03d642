"""pera::unit_rows: schema, shapes, gradient; without a GPU the definition runs."""

import torch
from torch import Tensor

from .. import backend, cost
from ..packing import HALF_OR_SINGLE
from .reference import unit_rows as definition

backend.register("unit_rows", "triton", available=backend.needs_triton)
backend.register("unit_rows", "pytorch")


@torch.library.custom_op("pera::unit_rows", mutates_args=())
def _unit_rows(x: Tensor, eps: float) -> Tensor:
    from . import triton

    return triton.unit_rows(x.contiguous(), eps)


@torch.library.custom_op("pera::unit_rows_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    from . import triton

    return triton.unit_rows_backward(grad.contiguous(), x.contiguous(), eps)


@_unit_rows.register_fake
def _(x, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(grad, x, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@cost.of("pera::unit_rows", "pera::unit_rows_backward")
def _(result, *arguments):
    return [cost.Cost(bytes=cost.size(result, arguments))]


def _setup_context(ctx, inputs, output) -> None:
    x, ctx.eps = inputs
    ctx.save_for_backward(x)


def _autograd(ctx, grad: Tensor):
    (x,) = ctx.saved_tensors
    return _backward(grad, x, ctx.eps), None


_unit_rows.register_autograd(_autograd, setup_context=_setup_context)


def unit_rows(x: Tensor, eps: float) -> Tensor:
    """``x / max(||x||, eps)`` of each row, computed in float32 (float64 for float64), rounded to the dtype of x.

    Args:
        x: [R, D].
        eps: the least length that divides.
    """
    if backend.choose("unit_rows", x.device) == "triton" and x.dtype in HALF_OR_SINGLE and x.ndim == 2 and x.numel():
        from . import triton

        if triton.why_not(x) is None:
            return _unit_rows(x, eps)
    return definition(x, eps)
