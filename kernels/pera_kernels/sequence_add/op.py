"""pera::sequence_add: schema, shapes, gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend, cost
from ..packing import check, kept_groups, kept_parts, num_tokens, pairs, split

backend.register("sequence_add", "triton", available=backend.needs_triton)
backend.register("sequence_add", "native", available=backend.needs_native("sequence_add", "sequence_add_backward"))


def _scales(groups: Sequence[int], kept_counts: Sequence[int]) -> list[float]:
    """n / kept of each group: what keeps the expectation of the stream."""
    return [n / k if k else 0.0 for (n, _), k in zip(pairs(groups), kept_counts, strict=True)]


@torch.library.custom_op("pera::sequence_add", mutates_args=())
def _sequence_add(x: Tensor, y: Tensor, keep: Tensor, groups: Sequence[int], kept_counts: Sequence[int]) -> Tensor:
    if (kernels := backend.kernels("sequence_add", x)) is not None:
        return kernels.sequence_add(x, y, keep, groups, kept_counts)
    out = x.clone(memory_format=torch.contiguous_format)
    branches = split(y, kept_groups(groups, kept_counts))
    for (part, k), branch, scale in zip(
        kept_parts(out, keep, groups, kept_counts), branches, _scales(groups, kept_counts), strict=True
    ):
        part.index_add_(0, k, branch, alpha=scale)
    return out


@_sequence_add.register_fake
def _(x, y, keep, groups, kept_counts):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("pera::sequence_add_backward", mutates_args=())
def _backward(grad: Tensor, keep: Tensor, groups: Sequence[int], kept_counts: Sequence[int]) -> Tensor:
    if (kernels := backend.kernels("sequence_add", grad)) is not None:
        return kernels.sequence_add_backward(grad, keep, groups, kept_counts)
    parts = [
        part.index_select(0, k).mul_(scale).flatten(0, 1)
        for (part, k), scale in zip(
            kept_parts(grad, keep, groups, kept_counts), _scales(groups, kept_counts), strict=True
        )
    ]
    return torch.cat(parts)


@_backward.register_fake
def _(grad, keep, groups, kept_counts):
    return grad.new_empty(num_tokens(kept_groups(groups, kept_counts)), grad.shape[1])


@cost.of("pera::sequence_add")
def _(result, x, y, _keep, groups, _kept):
    return cost.passes(cost.size(x, y, result), groups)


@cost.of("pera::sequence_add_backward")
def _(result, _grad, _keep, groups, _kept):
    return cost.passes(2 * cost.size(result), groups)


def _setup_context(ctx, inputs, output) -> None:
    _, _, keep, groups, kept_counts = inputs
    ctx.save_for_backward(keep)
    ctx.groups, ctx.kept_counts = groups, kept_counts


def _autograd(ctx, grad: Tensor):
    (keep,) = ctx.saved_tensors
    return grad, _backward(grad.contiguous(), keep, ctx.groups, ctx.kept_counts), None, None, None


_sequence_add.register_autograd(_autograd, setup_context=_setup_context)


def sequence_add(
    x: Tensor,
    y: Tensor,
    groups: Sequence[int],
    keep: Tensor | None = None,
    kept_counts: Sequence[int] = (),
) -> Tensor:
    """Add a residual branch's result, scaled by n / kept, to the kept sequences of a packed stream.

    docs/method.md section 4.4, stochastic depth. Without a subset this is ``x + y``.

    Args:
        x: packed tokens [T, D].
        y: the branch's result for the kept sequences [sum(kept_counts[i] * len[i]), D], dtype of x.
        groups: [n0, len0, n1, len1, ...], see ``pera_kernels.packing``.
        keep: int32 [sum(kept_counts)], kept sequence numbers of each group, without repetition; None keeps all.
        kept_counts: how many sequences of each group are kept; ignored if keep is None.

    Returns:
        [T, D], dtype of x.

    Raises:
        ValueError: x, y, groups and keep do not fit together.
    """
    check(x, keep, groups, kept_counts)
    if keep is None:
        return x + y
    if y.shape != (num_tokens(kept_groups(groups, kept_counts)), x.shape[1]):
        counts = list(kept_counts)
        raise ValueError(f"y {tuple(y.shape)} does not hold the kept sequences of groups {list(groups)}: {counts}")
    return _sequence_add(x, y, keep, list(groups), list(kept_counts))


sequence_add_backward = _backward
