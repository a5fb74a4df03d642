"""pera::sequence_norm: schema, shapes, gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend, cost
from ..packing import check, gather, kept_groups, kept_parts, num_tokens, split
from . import native

backend.register("sequence_norm", "triton", available=backend.needs_triton)
backend.register("sequence_norm", "native", available=backend.needs_native("sequence_norm", "sequence_norm_backward"))


def _kernels(x: Tensor) -> Any | None:
    kernels = backend.kernels("sequence_norm", x)
    return native if kernels is torch.ops.pera_native else kernels


def _wide(x: Tensor) -> Tensor:
    """x in the dtype that the arithmetic runs in: float32 for half types."""
    return x.float() if x.dtype.itemsize < 4 else x


@torch.library.custom_op("pera::sequence_norm", mutates_args=())
def _sequence_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    keep: Tensor | None,
    groups: Sequence[int],
    kept_counts: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    if (kernels := _kernels(x)) is not None:
        return kernels.sequence_norm(x, weight, bias, eps, keep, groups, kept_counts)
    rows = gather(x, keep, groups, kept_counts)
    # The CPU kernel pairs half rows with float32 parameters by itself; elsewhere the rows are widened here.
    wide = rows if rows.device.type == "cpu" and weight.dtype == torch.float32 else _wide(rows)
    params = (
        (weight, bias) if wide is rows and rows.dtype.itemsize < 4 else (weight.to(wide.dtype), bias.to(wide.dtype))
    )
    y, mean, rstd = torch.native_layer_norm(wide, rows.shape[1:], *params, eps)
    y = y.to(x.dtype)
    return y, mean.view(-1), rstd.view(-1)


@_sequence_norm.register_fake
def _(x, weight, bias, eps, keep, groups, kept_counts):
    n = x.shape[0] if keep is None else num_tokens(kept_groups(groups, kept_counts))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(n, x.shape[1]), x.new_empty(n, dtype=wide), x.new_empty(n, dtype=wide)


@torch.library.custom_op("pera::sequence_norm_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    keep: Tensor | None,
    groups: Sequence[int],
    kept_counts: Sequence[int],
) -> list[Tensor]:
    if (kernels := _kernels(x)) is not None:
        return list(kernels.sequence_norm_backward(grad, x, weight, mean, rstd, keep, groups, kept_counts))
    rows = gather(x, keep, groups, kept_counts)
    wide = _wide(rows)
    scale = weight.to(wide.dtype)
    stats = mean.view(-1, 1), rstd.view(-1, 1)
    grad_rows, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        _wide(grad), wide, rows.shape[1:], *stats, scale, scale, [True, True, True]
    )
    grad_rows = grad_rows.to(x.dtype)
    if keep is None:
        grad_x = grad_rows
    else:
        grad_x = torch.zeros_like(x)
        parts = split(grad_rows, kept_groups(groups, kept_counts))
        for (part, k), values in zip(kept_parts(grad_x, keep, groups, kept_counts), parts, strict=True):
            part.index_copy_(0, k.long(), values)
    return [grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)]


@_backward.register_fake
def _(grad, x, weight, mean, rstd, keep, groups, kept_counts):
    return [torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)]


@cost.of("pera::sequence_norm")
def _(result, _x, _weight, _bias, _eps, _keep, groups, _kept):
    rows, *stats = result
    return cost.passes(2 * cost.size(rows) + cost.size(stats), groups)  # reads as many rows as it writes


@cost.of("pera::sequence_norm_backward")
def _(result, grad, _x, _weight, mean, rstd, keep, groups, _kept):
    grad_x, *sums = result
    rows = 3 * cost.size(grad)  # gradients in and out, and x
    zeros = [] if keep is None else cost.passes(cost.size(grad_x) - cost.size(grad), groups)
    return [*zeros, *cost.passes(rows + cost.size(mean, rstd), groups), *(cost.Cost(bytes=cost.size(s)) for s in sums)]


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, _, keep, groups, kept_counts = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, mean, rstd, keep)
    ctx.groups, ctx.kept_counts = groups, kept_counts


def _autograd(ctx, grad: Tensor, _mean: Tensor, _rstd: Tensor):
    x, weight, mean, rstd, keep = ctx.saved_tensors
    grads = _backward(grad.contiguous(), x, weight, mean, rstd, keep, ctx.groups, ctx.kept_counts)
    return *grads, None, None, None, None


_sequence_norm.register_autograd(_autograd, setup_context=_setup_context)


def sequence_norm_with_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    groups: Sequence[int],
    keep: Tensor | None = None,
    kept_counts: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """As sequence_norm, with each row's mean and reciprocal standard deviation (float32) for a later recomputation."""
    check(x, keep, groups, kept_counts)
    return _sequence_norm(x, weight, bias, eps, keep, list(groups), list(kept_counts))


def sequence_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    groups: Sequence[int],
    keep: Tensor | None = None,
    kept_counts: Sequence[int] = (),
) -> Tensor:
    """LayerNorm of the kept sequences of a packed stream, without a copy of the stream.

    docs/method.md section 4.4: with stochastic depth a residual branch sees only a subset of the sequences.

    Args:
        x: packed tokens [T, D], float dtype. Statistics are float32 (float64 for float64).
        weight: scale [D], float32 or the dtype of x.
        bias: shift [D], dtype of weight.
        eps: added to the variance.
        groups: [n0, len0, n1, len1, ...], see ``pera_kernels.packing``.
        keep: int32 [sum(kept_counts)], kept sequence numbers of each group, without repetition; None keeps all.
        kept_counts: how many sequences of each group are kept; ignored if keep is None.

    Returns:
        [sum(kept_counts[i] * len[i]), D] in the dtype of x ([T, D] if keep is None).

    Raises:
        ValueError: x, groups and keep do not fit together.
    """
    return sequence_norm_with_stats(x, weight, bias, eps, groups, keep, kept_counts)[0]


sequence_norm_backward = _backward
