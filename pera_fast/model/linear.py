"""Linear layers of the heads, which save little for the backward pass.

No layer keeps a weight in the compute dtype, nor the GELU's result, which is one pass over memory away from its
argument. Products run in the dtype that the device is fast in (``pera_kernels.products``).
"""

import torch
from torch import Tensor

from pera_kernels import products
from pera_kernels.column_sums import column_sums
from pera_kernels.gelu import gelu, gelu_, gelu_backward_


def _parameter_gradients(
    grad: Tensor,  # [T, out]
    x: Tensor,  # [T, in]
    weight: Tensor,  # [out, in]
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of weight and bias of a linear layer, in their dtypes (None: it has no bias)."""
    grad_weight = products.weight_gradient(grad, x, weight.dtype)
    return grad_weight, None if bias_dtype is None else column_sums(grad).to(bias_dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, bias_gradient):
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None or not bias_gradient else bias.dtype
        return products.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = products.matmul(grad, weight)
        return grad_x, *_parameter_gradients(grad, x, weight, ctx.bias_dtype), None


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, bias_before, weight, bias, bias_gradient):
        ctx.save_for_backward(hidden, weight)
        ctx.bias_dtypes = bias_before.dtype, bias.dtype if bias_gradient else None
        return products.linear(gelu(hidden), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        before, bias_dtype = ctx.bias_dtypes
        grad_hidden = products.matmul(grad, weight)
        act, sums = gelu_backward_(grad_hidden, hidden, with_out=True)
        return grad_hidden, sums.to(before), *_parameter_gradients(grad, act, weight, bias_dtype), None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, bias_gradient: bool = True) -> Tensor:
    """``x W' + b`` in the dtype of x; keeps x.

    Args:
        x: [T, in], the compute dtype.
        weight: [out, in]; bias: [out] or None: any float dtype.
        bias_gradient: False where the ``gelu_linear`` that follows takes it.
    """
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias, bias_gradient)
    return products.linear(x, weight, bias)


def gelu_linear(
    hidden: Tensor, bias_before: Tensor, weight: Tensor, bias: Tensor, bias_gradient: bool = True
) -> Tensor:
    """``linear(gelu(hidden))`` (exact GELU) that keeps hidden [T, H], not the GELU's result.

    Where no gradient is recorded, hidden is overwritten: the caller gives it up.

    Args:
        bias_before: [H], the bias that hidden holds already; its gradient is taken here, by the GELU's own pass.
        weight, bias, bias_gradient: as for ``linear``.
    """
    if torch.is_grad_enabled():
        return _GeluLinear.apply(hidden, bias_before, weight, bias, bias_gradient)
    return products.linear(gelu_(hidden), weight, bias)
