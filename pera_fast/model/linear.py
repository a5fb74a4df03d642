"""Linear layers of the heads, by what each keeps for the backward pass.

No layer keeps a weight in the compute dtype, nor the GELU's result, which is one pass over memory away from its
argument. Products run in the dtype that the device is fast in (``pera_kernels.products``).
"""

import torch
from torch import Tensor

from pera_kernels import products
from pera_kernels.gelu import gelu, gelu_, gelu_backward_


def _parameter_gradients(
    grad: Tensor,  # [T, out]
    x: Tensor,  # [T, in]
    weight: Tensor,  # [out, in]
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of weight and bias of a linear layer, in their dtypes (None: it has no bias)."""
    grad_weight = products.weight_gradient(grad, x, weight.dtype)
    sums = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return grad_weight, None if bias_dtype is None else grad.sum(0, dtype=sums).to(bias_dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return products.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = products.matmul(grad, weight)
        return grad_x, *_parameter_gradients(grad, x, weight, ctx.bias_dtype)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias):
        ctx.save_for_backward(hidden, weight)
        ctx.bias_dtype = bias.dtype
        return products.linear(gelu(hidden), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        grad_hidden = products.matmul(grad, weight)
        act, _ = gelu_backward_(grad_hidden, hidden, with_out=True)
        return grad_hidden, *_parameter_gradients(grad, act, weight, ctx.bias_dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W' + b`` in the dtype of x; keeps x.

    Args:
        x: [T, in], the compute dtype.
        weight: [out, in]; bias: [out] or None: any float dtype.
    """
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else products.linear(x, weight, bias)


def gelu_linear(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``linear(gelu(hidden))`` (exact GELU) that keeps hidden [T, H], not the GELU's result.

    Where no gradient is recorded, hidden is overwritten: the caller gives it up.
    """
    if torch.is_grad_enabled():
        return _GeluLinear.apply(hidden, weight, bias)
    return products.linear(gelu_(hidden), weight, bias)
