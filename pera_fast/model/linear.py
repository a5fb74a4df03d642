"""Linear layers of the networks, by what each keeps for the backward pass.

None keeps a weight in the compute dtype: it is cast again. Policy ``cheap`` keeps neither the normalised stream nor the
GELU's result: both are one pass over memory away from what is kept anyway (the stream with two numbers a row, the
GELU's argument). Products run in the dtype that the device is fast in (``pera_kernels.products``).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pera_kernels import products
from pera_kernels.sequence_norm.op import sequence_norm_backward, sequence_norm_with_stats

# Gradients are taken apart, because what one of them needs is large and can be freed before the other is made.


def _parameter_gradients(
    grad: Tensor,  # [T, out]
    x: Tensor,  # [T, in]
    weight: Tensor,  # [out, in]
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of weight and bias of a linear layer, in their dtypes (None: it has no bias)."""
    dtype = products.product_dtype(grad.dtype, grad.device)
    grad_weight = (grad.to(dtype).t() @ x.to(dtype)).to(weight.dtype)
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


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, groups, keep, kept, weight, bias):
        normed, mean, rstd = sequence_norm_with_stats(x, norm_weight, norm_bias, eps, groups, keep, kept)
        ctx.save_for_backward(x, norm_weight, norm_bias, mean, rstd, keep, weight)
        ctx.eps, ctx.groups, ctx.kept, ctx.bias_dtype = eps, list(groups), list(kept), bias.dtype
        return products.linear(normed, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, norm_weight, norm_bias, mean, rstd, keep, weight = ctx.saved_tensors
        normed = sequence_norm_with_stats(x, norm_weight, norm_bias, ctx.eps, ctx.groups, keep, ctx.kept)[0]
        grad_weight, grad_bias = _parameter_gradients(grad, normed, weight, ctx.bias_dtype)
        del normed
        grad_x, grad_norm_weight, grad_norm_bias = sequence_norm_backward(
            products.matmul(grad, weight), x, norm_weight, mean, rstd, keep, ctx.groups, ctx.kept
        )
        return grad_x, grad_norm_weight, grad_norm_bias, None, None, None, None, grad_weight, grad_bias


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias):
        ctx.save_for_backward(hidden, weight)
        ctx.bias_dtype = bias.dtype
        return products.linear(F.gelu(hidden), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        grad_weight, grad_bias = _parameter_gradients(grad, F.gelu(hidden), weight, ctx.bias_dtype)
        grad_hidden = products.matmul(grad, weight)
        torch.ops.aten.gelu_backward.grad_input(grad_hidden, hidden, grad_input=grad_hidden)
        return grad_hidden, grad_weight, grad_bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W' + b`` in the dtype of x; keeps x.

    Args:
        x: [T, in], the compute dtype.
        weight: [out, in]; bias: [out] or None: any float dtype.
    """
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else products.linear(x, weight, bias)


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    groups: Sequence[int],
    keep: Tensor | None,
    kept: Sequence[int],
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """``linear(sequence_norm(x))`` that keeps x and two numbers a row, not the normalised copy.

    Args:
        x: packed tokens [T, D]; norm_weight, norm_bias: [D]; groups, keep, kept: see ``pera_kernels.sequence_norm``.
        weight: [out, D]; bias: [out]; cast to the dtype of x.

    Returns:
        [kept tokens, out] in the dtype of x.
    """
    return _NormLinear.apply(x, norm_weight, norm_bias, eps, groups, keep, kept, weight, bias)


def gelu_linear(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``linear(gelu(hidden))`` (exact GELU) that keeps hidden [T, H], not the GELU's result.

    Where no gradient is recorded, hidden is overwritten: the caller gives it up.
    """
    if torch.is_grad_enabled():
        return _GeluLinear.apply(hidden, weight, bias)
    return products.linear(torch.ops.aten.gelu_(hidden), weight, bias)
