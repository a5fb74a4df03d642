"""pera::gelu, in place and not, and its gradient in place: schema, shapes, implementations."""

import torch
from torch import Tensor

from .. import backend, cost
from ..column_sums import column_sums
from . import native

aten = torch.ops.aten
backend.register("gelu", "triton", available=backend.needs_triton)
backend.register("gelu", "native", available=backend.needs_native("gelu", "gelu_backward_"))
backend.register("gelu", "pytorch")


def _kernels(x: Tensor):
    kernels = backend.kernels("gelu", x) if x.numel() and x.is_contiguous() else None
    return native if kernels is torch.ops.pera_native else kernels


def _sums_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op("pera::gelu", mutates_args=())
def _gelu(x: Tensor) -> Tensor:
    if (kernels := _kernels(x)) is not None:
        return kernels.gelu(x, torch.empty_like(x))
    return aten.gelu(x)


@_gelu.register_fake
def _(x):
    return torch.empty_like(x)


@torch.library.custom_op("pera::gelu_", mutates_args=("x",))
def _gelu_inplace(x: Tensor) -> None:
    if (kernels := _kernels(x)) is not None:
        kernels.gelu(x, x)
    else:
        aten.gelu_(x)


@torch.library.custom_op("pera::gelu_backward_", mutates_args=("grad",))
def _backward(grad: Tensor, x: Tensor, with_out: bool) -> tuple[Tensor, Tensor]:
    if (kernels := _kernels(x)) is not None and grad.is_contiguous():
        return kernels.gelu_backward_(grad, x, with_out)
    out = aten.gelu(x) if with_out else x.new_empty(0, x.shape[1])
    aten.gelu_backward.grad_input(grad, x, grad_input=grad)
    return out, column_sums(grad)


@_backward.register_fake
def _(grad, x, with_out):
    return x.new_empty(x.shape if with_out else (0, x.shape[1])), x.new_empty(x.shape[1], dtype=_sums_dtype(x))


@cost.of("pera::gelu")
def _(result, x):
    return [cost.Cost(bytes=cost.size(x, result))]


@cost.of("pera::gelu_")
def _(_result, x):
    return [cost.Cost(bytes=2 * cost.size(x))]


@cost.of("pera::gelu_backward_")
def _(result, grad, x, _with_out):
    out, sums = result
    return [cost.Cost(bytes=2 * cost.size(grad) + cost.size(x, out)), cost.Cost(bytes=cost.size(sums))]


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad: Tensor):
    (x,) = ctx.saved_tensors
    grad = grad.clone(memory_format=torch.contiguous_format)
    if grad.numel():
        columns = x.shape[-1] if x.ndim else 1
        _backward(grad.view(-1, columns), x.reshape(-1, columns), False)
    return grad


_gelu.register_autograd(_autograd, setup_context=_setup_context)


def gelu(x: Tensor) -> Tensor:
    """Exact GELU, ``x * Phi(x)``, of a tensor of any shape, in its dtype; float32 inside."""
    return _gelu(x)


def gelu_(x: Tensor) -> Tensor:
    """Exact GELU in place; returns x."""
    _gelu_inplace(x)
    return x


def gelu_backward_(grad: Tensor, x: Tensor, with_out: bool = False) -> tuple[Tensor, Tensor]:
    """Turn the gradient of ``gelu(x)`` into that of x, in place.

    Args:
        grad: gradient of ``gelu(x)`` [R, C]; overwritten.
        x: [R, C], dtype of grad.
        with_out: also compute ``gelu(x)`` again, which the next layer's weight gradient wants.

    Returns:
        ``gelu(x)`` [R, C], or [0, C]; column sums [C] of the gradient of x before it is rounded, float32 (float64 for
        float64): the gradient of the bias in x.
    """
    return _backward(grad, x, with_out)
