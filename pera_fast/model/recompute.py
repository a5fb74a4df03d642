"""Linear layers that recompute their cheap input in the backward pass instead of keeping it.

Policy ``cheap``: neither the normalised stream nor the GELU's result is kept; both are one pass over memory away from
what is kept anyway (the stream with two numbers a row, the GELU's argument).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pera_kernels.sequence_norm.op import sequence_norm_backward, sequence_norm_with_stats


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W' + b in the dtype of x; weight and bias are cast."""
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def _linear_grads(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias of a linear layer; weight comes in the compute dtype."""
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return grad @ weight, grad.t() @ x, grad.sum(0, dtype=wide)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, groups, keep, kept, weight, bias):
        normed, mean, rstd = sequence_norm_with_stats(x, norm_weight, norm_bias, eps, groups, keep, kept)
        ctx.save_for_backward(x, norm_weight, norm_bias, mean, rstd, keep, weight)
        ctx.eps, ctx.groups, ctx.kept, ctx.bias_dtype = eps, list(groups), list(kept), bias.dtype
        return linear(normed, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, norm_weight, norm_bias, mean, rstd, keep, weight = ctx.saved_tensors
        normed = sequence_norm_with_stats(x, norm_weight, norm_bias, ctx.eps, ctx.groups, keep, ctx.kept)[0]
        grad_normed, grad_weight, grad_bias = _linear_grads(grad, normed, weight.to(grad.dtype))
        del normed
        grad_x, grad_norm_weight, grad_norm_bias = sequence_norm_backward(
            grad_normed.contiguous(), x, norm_weight, mean, rstd, keep, ctx.groups, ctx.kept
        )
        return (
            *(grad_x, grad_norm_weight, grad_norm_bias, None, None, None, None),
            *(grad_weight.to(weight.dtype), grad_bias.to(ctx.bias_dtype)),
        )


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias):
        ctx.save_for_backward(hidden, weight)
        ctx.bias_dtype = bias.dtype
        return linear(F.gelu(hidden), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        grad_act, grad_weight, grad_bias = _linear_grads(grad, F.gelu(hidden), weight.to(grad.dtype))
        grad_hidden = torch.ops.aten.gelu_backward(grad_act, hidden)
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(ctx.bias_dtype)


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
    """``linear(gelu(hidden))`` (exact GELU) that keeps hidden [T, H], not the GELU's result."""
    return _GeluLinear.apply(hidden, weight, bias)
