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


def _gradients(
    grad: Tensor,  # [T, out]
    x: Tensor,  # [T, in]
    weight: Tensor,  # [out, in]
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias of a linear layer, in the dtypes of grad, weight and bias (None: has no bias)."""
    dtype = products.product_dtype(grad.dtype, grad.device)
    wide = grad.to(dtype)
    grad_weight = (wide.t() @ x.to(dtype)).to(weight.dtype)
    sums = torch.float64 if grad.dtype == torch.float64 else torch.float32
    grad_bias = None if bias_dtype is None else grad.sum(0, dtype=sums).to(bias_dtype)
    return (wide @ weight.to(dtype)).to(grad.dtype), grad_weight, grad_bias


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return products.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return _gradients(grad, x, weight, ctx.bias_dtype)


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
        grad_normed, grad_weight, grad_bias = _gradients(grad, normed, weight, ctx.bias_dtype)
        del normed
        grad_x, grad_norm_weight, grad_norm_bias = sequence_norm_backward(
            grad_normed.contiguous(), x, norm_weight, mean, rstd, keep, ctx.groups, ctx.kept
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
        grad_act, grad_weight, grad_bias = _gradients(grad, F.gelu(hidden), weight, ctx.bias_dtype)
        return torch.ops.aten.gelu_backward(grad_act, hidden), grad_weight, grad_bias


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
