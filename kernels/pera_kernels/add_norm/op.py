"""pera::add_norm: schema, shapes, gradient, choice of implementation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend, cost
from ..column_sums import column_sums
from ..packing import kept_groups, num_tokens
from ..sequence_add.op import sequence_add, sequence_add_backward
from ..sequence_norm.op import sequence_norm_backward, sequence_norm_with_stats
from . import native
from .arguments import Norm, Subsets, kept

backend.register("add_norm", "triton", available=backend.needs_triton)
backend.register("add_norm", "native", available=backend.needs_native("add_norm", "add_norm_backward"))
backend.register("add_norm", "composed")  # of sequence_add and sequence_norm


def _kernels(x: Tensor):
    kernels = backend.kernels("add_norm", x)
    return native if kernels is torch.ops.pera_native else kernels


def _stats_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op("pera::add_norm", mutates_args=())
def _add_norm(
    x: Tensor,
    y: Tensor,
    y_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    groups: Sequence[int],
    add_subset: Tensor | None,
    add_counts: Sequence[int],
    norm_subset: Tensor | None,
    norm_counts: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if (kernels := _kernels(x)) is not None:
        subsets = Subsets(groups, add_subset, add_counts, norm_subset, norm_counts)
        return kernels.add_norm(x, y, y_bias, Norm(weight, bias, eps), subsets)
    if y_bias is not None:
        y = y + y_bias.to(y.dtype)
    keep = kept(add_subset, add_counts)
    out = sequence_add(x, y, groups, keep, add_counts)
    if weight is None or bias is None:
        none = x.new_empty(0, dtype=_stats_dtype(x))
        return out, x.new_empty(0, x.shape[1]), none, none.clone()
    norm_keep = kept(norm_subset, norm_counts)
    return out, *sequence_norm_with_stats(out, weight, bias, eps, groups, norm_keep, norm_counts)


@_add_norm.register_fake
def _(x, y, y_bias, weight, bias, eps, groups, add_subset, add_counts, norm_subset, norm_counts):
    rows = 0 if weight is None else num_tokens(kept_groups(groups, None if norm_subset is None else norm_counts))
    stats = (x.new_empty(rows, dtype=_stats_dtype(x)) for _ in range(2))
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(rows, x.shape[1]), *stats


@torch.library.custom_op("pera::add_norm_", mutates_args=("x",))
def _add_norm_inplace(
    x: Tensor, y: Tensor, y_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float, groups: Sequence[int]
) -> Tensor:
    if (kernels := _kernels(x)) is not None and x.is_contiguous():
        return kernels.add_norm(x, y, y_bias, Norm(weight, bias, eps), Subsets(groups), inplace=True)[1]
    x.add_(y)
    if y_bias is not None:
        x.add_(y_bias)
    return sequence_norm_with_stats(x, weight, bias, eps, groups)[0]


@_add_norm_inplace.register_fake
def _(x, y, y_bias, weight, bias, eps, groups):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("pera::add_norm_backward", mutates_args=())
def _backward(
    grad: Tensor | None,
    grad_normed: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    groups: Sequence[int],
    add_subset: Tensor | None,
    add_counts: Sequence[int],
    norm_subset: Tensor | None,
    norm_counts: Sequence[int],
    has_add: bool,
    has_bias: bool,
) -> list[Tensor]:
    if (kernels := _kernels(x)) is not None:
        subsets = Subsets(groups, add_subset, add_counts, norm_subset, norm_counts)
        return kernels.add_norm_backward(grad, grad_normed, x, weight, mean, rstd, subsets, has_add, has_bias)
    sums = x.new_zeros(3, x.shape[1], dtype=_stats_dtype(x))
    if grad_normed is None or weight is None or mean is None or rstd is None:
        assert grad is not None
        grad_x = grad.clone()
    else:
        keep = kept(norm_subset, norm_counts)
        grad_x, sums[0], sums[1] = sequence_norm_backward(
            grad_normed.contiguous(), x, weight, mean, rstd, keep, groups, norm_counts
        )
        if grad is not None:
            grad_x.add_(grad)
    keep = kept(add_subset, add_counts)
    grad_y = grad_x.new_empty(0, x.shape[1])
    if has_add and keep is not None:
        grad_y = sequence_add_backward(grad_x, keep, groups, add_counts)
    if has_bias:
        sums[2] = column_sums(grad_x if keep is None else grad_y)
    return [grad_x, grad_y, sums]


@_backward.register_fake
def _(
    grad,
    grad_normed,
    x,
    weight,
    mean,
    rstd,
    groups,
    add_subset,
    add_counts,
    norm_subset,
    norm_counts,
    has_add,
    has_bias,
):
    subset = has_add and add_subset is not None
    rows = num_tokens(kept_groups(groups, add_counts)) if subset else 0
    sums = x.new_empty(3, x.shape[1], dtype=_stats_dtype(x))
    return [torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(rows, x.shape[1]), sums]


@cost.of("pera::add_norm")
def _(result, x, y, _y_bias, _weight, _bias, _eps, groups, *_subsets):
    return cost.passes(cost.size(x, y, result), groups)


@cost.of("pera::add_norm_")
def _(result, x, y, _y_bias, _weight, _bias, _eps, groups):
    return cost.passes(2 * cost.size(x) + cost.size(y, result), groups)


@cost.of("pera::add_norm_backward")
def _(result, grad, grad_normed, x, _weight, mean, rstd, groups, *rest):
    grad_x, grad_y, sums = result
    moved = cost.size(grad, grad_normed, x, mean, rstd, grad_x, grad_y)
    has_norm, has_bias = grad_normed is not None, rest[-1]
    # All three sums are added up at once; where some are not wanted, they are zeroed first.
    launches = 1 if has_norm and has_bias else 2 if has_norm or has_bias else 1
    return [*cost.passes(moved, groups), cost.Cost(launches, cost.size(sums))]


def _setup_context(ctx, inputs, output) -> None:
    _, _, y_bias, weight, bias, _, ctx.groups, add_subset, ctx.add_counts, norm_subset, ctx.norm_counts = inputs
    stream, normed, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd, *(() if weight is not None else (normed,)))
    ctx.save_for_backward(stream, weight, mean, rstd, add_subset, norm_subset)
    ctx.dtypes = [None if t is None else t.dtype for t in (y_bias, weight, bias)]


def _autograd(ctx, grad: Tensor, grad_normed: Tensor, _mean: Tensor, _rstd: Tensor):
    stream, weight, mean, rstd, add_subset, norm_subset = ctx.saved_tensors
    y_bias, weight_dtype, bias_dtype = ctx.dtypes
    grad_x, grad_y, sums = add_norm_backward(
        grad, None if weight is None else grad_normed, stream, weight, mean, rstd, ctx.groups, add_subset,
        ctx.add_counts, norm_subset, ctx.norm_counts, has_bias=y_bias is not None,
    )  # fmt: skip
    if grad_y is grad_x:
        grad_y = grad_x.clone()  # results of an op's formula may not be one tensor
    wanted = ((y_bias, 2), (weight_dtype, 0), (bias_dtype, 1))
    return grad_x, grad_y, *(None if dtype is None else sums[i].to(dtype) for dtype, i in wanted), *[None] * 6


_add_norm.register_autograd(_autograd, setup_context=_setup_context)


def add_norm(
    x: Tensor,
    y: Tensor,
    y_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    groups: Sequence[int],
    add_subset: Tensor | None = None,
    add_counts: Sequence[int] = (),
    norm_subset: Tensor | None = None,
    norm_counts: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add a residual branch to a packed stream and apply the LayerNorm of the next branch.

    docs/method.md section 4.4, stochastic depth: the sum is ``x + n / kept * (y + y_bias)`` on the sequences that
    the branch saw and x on the others; the norm takes the sequences that the next branch sees.

    Args:
        x: packed tokens [T, D], float dtype.
        y: the branch's result [rows of its sequences, D], dtype of x.
        y_bias: bias of the branch's last layer [D], any float dtype; None: y has it already.
        weight, bias: scale and shift of the norm [D]; None for both: no norm.
        eps: added to the variance.
        groups: [n0, len0, n1, len1, ...], see ``pera_kernels.packing``.
        add_subset: int32 [sum(add_counts) + sum(n)], sequences that the branch saw, as ``packing.with_places`` gives
            them; None: all.
        add_counts: how many of each group; ignored if add_subset is None.
        norm_subset, norm_counts: likewise, for the norm.

    Returns:
        The sum [T, D] and the normalised rows [rows of norm_subset, D] in the dtype of x (no rows without a norm);
        their mean and reciprocal standard deviation, float32 (float64 for float64). The sum is float32 inside and
        rounded once; the norm starts from the rounded sum.

    Raises:
        ValueError: x, y and groups do not fit together.
    """
    rows = num_tokens(kept_groups(groups, None if add_subset is None else add_counts))
    if x.shape[0] != num_tokens(groups) or y.shape != (rows, x.shape[1]):
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} do not hold the tokens of groups {list(groups)}")
    lists = list(groups), add_subset, list(add_counts), norm_subset, list(norm_counts)
    return _add_norm(x, y, y_bias, weight, bias, eps, *lists)


def add_norm_(
    x: Tensor, y: Tensor, y_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float, groups: Sequence[int]
) -> Tensor:
    """Add ``y + y_bias`` to x [T, D] in place and return the LayerNorm of the sum [T, D]; see ``add_norm``."""
    return _add_norm_inplace(x, y, y_bias, weight, bias, eps, list(groups))


def add_norm_backward(
    grad: Tensor | None,
    grad_normed: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    groups: Sequence[int],
    add_subset: Tensor | None = None,
    add_counts: Sequence[int] = (),
    norm_subset: Tensor | None = None,
    norm_counts: Sequence[int] = (),
    has_add: bool = True,
    has_bias: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``add_norm``.

    Args:
        grad: of the sum [T, D]; None: zero.
        grad_normed: of the normalised rows; None where there is no norm.
        x: the sum [T, D] that forward returned, with its mean and rstd; weight as there.
        has_add: whether a branch was added; without one the norm alone is taken back, and grad_y is empty.
        has_bias: whether it had a bias.

    Returns:
        grad_x [T, D]; grad_y [rows of add_subset, D], which is grad_x itself if the branch saw all sequences; sums
        [3, D], float32 (float64 for float64): gradients of weight, bias and y_bias, zero where there is none.
    """
    lists = list(groups), add_subset, list(add_counts), norm_subset, list(norm_counts)
    grad_x, grad_y, sums = _backward(grad, grad_normed, x, weight, mean, rstd, *lists, has_add, has_add and has_bias)
    return grad_x, grad_x if has_add and add_subset is None else grad_y, sums
