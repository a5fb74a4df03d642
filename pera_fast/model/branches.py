"""The two residual branches of a transformer block, forward and backward, on packed tokens.

A branch begins with the sum and the norm that the branch before it left to do (``pera_kernels.add_norm``), so the
stream is read and written once a branch. What each keeps for the backward pass depends on the policy: ``cheap`` keeps
neither the normalised stream nor the GELU's result, which are one pass over memory away from what is kept anyway;
``none`` keeps both. No weight is kept in the compute dtype.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pera_kernels import products
from pera_kernels.add_norm import add_norm, add_norm_, add_norm_backward
from pera_kernels.attention.op import attention_backward_with_sums, attention_parts, attention_with_lse
from pera_kernels.cls_attention import cls_attention
from pera_kernels.cls_attention import takes as cls_attention_takes
from pera_kernels.column_sums import column_sums
from pera_kernels.linear_gelu import linear_gelu, linear_gelu_backward
from pera_kernels.packing import kept_groups
from pera_kernels.query_attention import query_attention, query_attention_backward
from pera_kernels.sequence_add.op import sequence_add_backward
from pera_kernels.sequence_norm.op import sequence_norm_with_stats

from .rows import add_to_rows_, rows_gradient, take_rows


class Plan(NamedTuple):
    """Settings that the branches of a network share.

    Attributes:
        groups: [n0, len0, n1, len1, ...], see ``pera_kernels.packing``.
        kept_counts: sequences of each group that a branch sees; None: all of them.
        keep_cheap: whether to keep what is cheap to compute again.
        fp8: whether products run in FP8 (``fp8.py``): without gradients and subsets only.
    """

    groups: tuple[int, ...]
    kept_counts: tuple[int, ...] | None
    keep_cheap: bool
    fp8: bool = False

    @property
    def branch_groups(self) -> list[int]:
        """The groups of the tokens that a branch sees."""
        return kept_groups(self.groups, self.kept_counts)


class Pending(NamedTuple):
    """A branch's result that is still to be added to the stream.

    Attributes:
        y: [rows of its sequences, D].
        bias: [D], of its last layer; None: y has it.
        subset: int32 [sum(kept_counts) + sum(n)], its sequences and their places (``packing.with_places``); None: all.
    """

    y: Tensor
    bias: Tensor | None
    subset: Tensor | None


def output_bias(layer: nn.Linear, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(bias that the product adds, bias left to ``add_norm``): on a CPU the product adds it at no cost."""
    return (layer.bias, None) if x.device.type == "cpu" else (None, layer.bias)


def _keep(subset: Tensor | None, plan: Plan) -> Tensor | None:
    return None if subset is None or plan.kept_counts is None else subset[: sum(plan.kept_counts)]


def _norm(
    x: Tensor, y: Tensor | None, y_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
    before: Tensor | None, subset: Tensor | None, plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The stream with y added, the normalised rows of the subset, their means and reciprocal deviations."""
    kept_counts = plan.kept_counts or ()
    if y is None:
        return x, *sequence_norm_with_stats(x, weight, bias, eps, plan.groups, _keep(subset, plan), kept_counts)
    return add_norm(x, y, y_bias, weight, bias, eps, plan.groups, before, kept_counts, subset, kept_counts)


class _Branch(torch.autograd.Function):
    """Base of both branches: their beginning, and its gradient."""

    @staticmethod
    def begin(ctx, x, y, y_bias, norm_weight, norm_bias, eps, before, subset, plan):
        """Adds and normalises; returns the stream and the normalised rows."""
        stream, normed, mean, rstd = _norm(x, y, y_bias, norm_weight, norm_bias, eps, before, subset, plan)
        ctx.eps, ctx.plan, ctx.has_add, ctx.has_bias = eps, plan, y is not None, y_bias is not None
        ctx.bias_dtype = None if y_bias is None else y_bias.dtype
        saved_normed = normed if plan.keep_cheap else None
        return stream, normed, (stream, mean, rstd, norm_weight, norm_bias, before, subset, saved_normed)

    @staticmethod
    def normed(ctx, saved) -> Tensor:
        """The normalised rows, kept or made again."""
        stream, _, _, weight, bias, _, subset, saved_normed = saved
        if saved_normed is not None:
            return saved_normed
        keep = _keep(subset, ctx.plan)
        return sequence_norm_with_stats(
            stream, weight, bias, ctx.eps, ctx.plan.groups, keep, ctx.plan.kept_counts or ()
        )[0]

    @staticmethod
    def end(ctx, saved, grad_stream, grad_normed):
        """Gradients of (x, y, y_bias, norm_weight, norm_bias), then None for what has none."""
        stream, mean, rstd, weight, bias, before, subset, _ = saved
        kept_counts = ctx.plan.kept_counts or ()
        grad_x, grad_y, sums = add_norm_backward(
            grad_stream, grad_normed, stream, weight, mean, rstd, ctx.plan.groups, before, kept_counts, subset,
            kept_counts, has_add=ctx.has_add, has_bias=ctx.has_bias,
        )  # fmt: skip
        grad_bias = sums[2].to(ctx.bias_dtype) if ctx.has_bias else None
        norm_gradients = sums[0].to(weight.dtype), sums[1].to(bias.dtype)
        return grad_x, grad_y if ctx.has_add else None, grad_bias, *norm_gradients, None, None, None, None


def _column_sums(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return column_sums(grad).to(dtype)


def _bias_gradient(grad: Tensor, has_bias: bool, dtype: torch.dtype) -> Tensor | None:
    return _column_sums(grad, dtype) if has_bias else None


class _AttentionBranch(_Branch):
    @staticmethod
    def forward(ctx, *inputs):
        beginning, (qkv_weight, qkv_bias, weight, bias, num_heads) = inputs[:9], inputs[9:]
        stream, normed, saved = _Branch.begin(ctx, *beginning)
        qkv = products.linear(normed, qkv_weight, qkv_bias)
        out, lse = attention_with_lse(qkv, num_heads, ctx.plan.branch_groups)
        ctx.num_heads, ctx.adds_bias = num_heads, bias is not None
        ctx.save_for_backward(*saved, qkv, out, lse, qkv_weight, qkv_bias, weight)
        return stream, products.linear(out, weight, bias)

    @staticmethod
    def backward(ctx, grad_stream, grad):
        *saved, qkv, out, lse, qkv_weight, qkv_bias, weight = ctx.saved_tensors
        grad_weight = products.weight_gradient(grad, out, weight.dtype)
        grad_bias = _bias_gradient(grad, ctx.adds_bias, weight.dtype)
        grad_out = products.matmul(grad, weight)
        groups = ctx.plan.branch_groups
        grad_qkv, sums = attention_backward_with_sums(grad_out, qkv, out, lse, ctx.num_heads, groups)
        del grad_out
        grad_qkv_weight = products.weight_gradient(grad_qkv, _Branch.normed(ctx, saved), qkv_weight.dtype)
        grad_normed = products.matmul(grad_qkv, qkv_weight)
        del grad_qkv
        return (
            *_Branch.end(ctx, saved, grad_stream, grad_normed),
            *(grad_qkv_weight, sums.to(qkv_bias.dtype), grad_weight, grad_bias, None),
        )


class _LastAttentionBranch(_Branch):
    """Attention whose result only some rows need: ``rows.take_rows`` says which."""

    @staticmethod
    def forward(ctx, *inputs):
        beginning, (qkv_weight, qkv_bias, weight, bias, num_heads, tails) = inputs[:9], inputs[9:]
        stream, normed, saved = _Branch.begin(ctx, *beginning)
        groups, dim = ctx.plan.branch_groups, stream.shape[1]
        picked = take_rows(normed, groups, tails)
        q = products.linear(picked, qkv_weight, qkv_bias, slice(0, dim))
        kv = products.linear(normed, qkv_weight, qkv_bias, slice(dim, None))
        out, lse = query_attention(q, kv, num_heads, [1 + tail for tail in tails], groups)
        ctx.num_heads, ctx.adds_bias, ctx.tails = num_heads, bias is not None, tails
        ctx.save_for_backward(*saved, q, kv, out, lse, qkv_weight, qkv_bias, weight)
        return take_rows(stream, ctx.plan.groups, tails), products.linear(out, weight, bias)

    @staticmethod
    def backward(ctx, grad_rows, grad):
        *saved, q, kv, out, lse, qkv_weight, qkv_bias, weight = ctx.saved_tensors
        groups, tails, dim = ctx.plan.branch_groups, ctx.tails, q.shape[1]
        queries = [1 + tail for tail in tails]
        grad_weight = products.weight_gradient(grad, out, weight.dtype)
        grad_bias = _bias_gradient(grad, ctx.adds_bias, weight.dtype)
        grad_out = products.matmul(grad, weight)
        grad_q, grad_kv = query_attention_backward(grad_out, q, kv, out, lse, ctx.num_heads, queries, groups)
        normed = _Branch.normed(ctx, saved)
        parts = (grad_q, take_rows(normed, groups, tails)), (grad_kv, normed)
        grad_qkv_weight = torch.cat([products.weight_gradient(g, x, qkv_weight.dtype) for g, x in parts])
        grad_qkv_bias = torch.cat([_column_sums(g, qkv_bias.dtype) for g, _ in parts])
        del parts, normed
        grad_normed = products.matmul(grad_kv, qkv_weight, slice(dim, None))
        add_to_rows_(grad_normed, products.matmul(grad_q, qkv_weight, slice(0, dim)), groups, tails)
        grad_stream = rows_gradient(grad_rows, ctx.plan.groups, tails)
        return (
            *_Branch.end(ctx, saved, grad_stream, grad_normed),
            *(grad_qkv_weight, grad_qkv_bias, grad_weight, grad_bias, None, None),
        )


class _MlpBranch(_Branch):
    @staticmethod
    def forward(ctx, *inputs):
        beginning, (weight1, bias1, weight2, bias2) = inputs[:9], inputs[9:]
        stream, normed, saved = _Branch.begin(ctx, *beginning)
        act, hidden = linear_gelu(normed, weight1, bias1, with_hidden=True)
        ctx.adds_bias = bias2 is not None
        ctx.save_for_backward(*saved, hidden, act if ctx.plan.keep_cheap else None, weight1, bias1, weight2)
        return stream, products.linear(act, weight2, bias2)

    @staticmethod
    def backward(ctx, grad_stream, grad):
        *saved, hidden, act, weight1, bias1, weight2 = ctx.saved_tensors
        grad_bias2 = _bias_gradient(grad, ctx.adds_bias, weight2.dtype)
        grad_hidden, sums, again = linear_gelu_backward(grad, weight2, hidden, with_act=act is None)
        grad_weight2 = products.weight_gradient(grad, again if act is None else act, weight2.dtype)
        del again, act
        grad_weight1 = products.weight_gradient(grad_hidden, _Branch.normed(ctx, saved), weight1.dtype)
        grad_normed = products.matmul(grad_hidden, weight1)
        del grad_hidden
        return (
            *_Branch.end(ctx, saved, grad_stream, grad_normed),
            *(grad_weight1, sums.to(bias1.dtype), grad_weight2, grad_bias2),
        )


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, y_bias, subset, plan):
        ctx.save_for_backward(subset)
        ctx.plan, ctx.bias_dtype = plan, None if y_bias is None else y_bias.dtype
        return add_norm(x, y, y_bias, None, None, 0.0, plan.groups, subset, plan.kept_counts or ())[0]

    @staticmethod
    def backward(ctx, grad):
        (subset,) = ctx.saved_tensors
        plan, keep = ctx.plan, _keep(subset, ctx.plan)
        grad_y = grad if keep is None else sequence_add_backward(grad.contiguous(), keep, plan.groups, plan.kept_counts)
        grad_bias = None if ctx.bias_dtype is None else _column_sums(grad_y, ctx.bias_dtype)
        return grad, grad_y, grad_bias, None, None


class _AddNorm(torch.autograd.Function):
    """The normalised sum alone."""

    @staticmethod
    def forward(ctx, *beginning):
        _, normed, saved = _Branch.begin(ctx, *beginning)
        ctx.save_for_backward(*saved[:-1], None)
        return normed

    @staticmethod
    def backward(ctx, grad):
        return _Branch.end(ctx, ctx.saved_tensors, None, grad)


class _Beginning(NamedTuple):
    """The arguments that every branch begins with."""

    x: Tensor
    y: Tensor | None
    y_bias: Tensor | None
    weight: Tensor
    bias: Tensor
    eps: float
    before: Tensor | None
    subset: Tensor | None
    plan: Plan


def _beginning(x: Tensor, pending: Pending | None, norm: nn.LayerNorm, subset: Tensor | None, plan: Plan) -> _Beginning:
    y, y_bias, before = (None, None, None) if pending is None else pending
    return _Beginning(x, y, y_bias, norm.weight, norm.bias, norm.eps, before, subset, plan)


def _begin_without_gradient(
    x: Tensor, pending: Pending | None, norm: nn.LayerNorm, subset: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor]:
    """The stream, which is x overwritten where no branch dropped sequences, and the normalised rows."""
    if pending is None or pending.subset is not None or subset is not None:
        return _norm(*_beginning(x, pending, norm, subset, plan))[:2]
    return x, add_norm_(x, pending.y, pending.bias, norm.weight, norm.bias, norm.eps, plan.groups)


def _rows_attention(
    normed: Tensor, qkv: nn.Linear, num_heads: int, groups: Sequence[int], tails: Sequence[int]
) -> Tensor:
    """The attention's result for the rows that are read [sum(n * (1 + tail)), D]; no gradient."""
    if not any(tails) and cls_attention_takes(groups):
        return cls_attention(normed, qkv.weight, qkv.bias, num_heads, groups)
    dim = normed.shape[1]
    q = products.linear(take_rows(normed, groups, tails), qkv.weight, qkv.bias, slice(0, dim))
    kv = products.linear(normed, qkv.weight, qkv.bias, slice(dim, None))
    return query_attention(q, kv, num_heads, [1 + tail for tail in tails], groups)[0]


class AttentionLayers(NamedTuple):
    """Layers of an attention branch."""

    norm: nn.LayerNorm
    qkv: nn.Linear
    proj: nn.Linear
    num_heads: int


def attention_branch(
    x: Tensor,
    pending: Pending | None,
    layers: AttentionLayers,
    subset: Tensor | None,
    plan: Plan,
    tails: Sequence[int] | None = None,
) -> tuple[Tensor, Pending]:
    """Add what is pending, normalise, attend.

    Args:
        x: packed tokens [T, D] in the compute dtype; overwritten where no gradient is recorded.
        pending: the result of the branch before; None: x is complete.
        layers: of the branch.
        subset: int32 [sum(kept_counts) + sum(n)], the sequences that the branch sees, with places; None: all.
        plan: groups and policy.
        tails: None, or for a network's last block the rows that are read (``rows.take_rows``).

    Returns:
        The stream [T, D] and the branch's result, to be added to it; with tails the rows of both that are read.
    """
    norm, qkv, proj, num_heads = layers
    added, left = output_bias(proj, x)
    if torch.is_grad_enabled():
        beginning = _beginning(x, pending, norm, subset, plan)
        parameters = qkv.weight, qkv.bias, proj.weight, added, num_heads
        if tails is not None:
            x, y = _LastAttentionBranch.apply(*beginning, *parameters, tuple(tails))
        else:
            x, y = _AttentionBranch.apply(*beginning, *parameters)
        return x, Pending(y, left, subset)
    x, normed = _begin_without_gradient(x, pending, norm, subset, plan)
    groups = plan.branch_groups
    if tails is None:
        parts = attention_parts(products.linear(normed, qkv.weight, qkv.bias), num_heads, groups)
    else:
        parts = [_rows_attention(normed, qkv, num_heads, groups, tails)]
        x = take_rows(x, plan.groups, tails)
    return x, Pending(products.linear_of_parts(parts, proj.weight, added), left, subset)


def mlp_branch(
    x: Tensor,
    pending: Pending,
    norm: nn.LayerNorm,
    fc1: nn.Linear,
    fc2: nn.Linear,
    subset: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, Pending]:
    """Add what is pending, normalise, run the MLP; arguments and result as those of ``attention_branch``."""
    added, left = output_bias(fc2, x)
    if torch.is_grad_enabled():
        layers = fc1.weight, fc1.bias, fc2.weight, added
        x, y = _MlpBranch.apply(*_beginning(x, pending, norm, subset, plan), *layers)
    else:
        x, normed = _begin_without_gradient(x, pending, norm, subset, plan)
        y = products.linear(linear_gelu(normed, fc1.weight, fc1.bias)[0], fc2.weight, added)
    return x, Pending(y, left, subset)


def add_pending(x: Tensor, pending: Pending, plan: Plan) -> Tensor:
    """The complete stream [T, D]."""
    return _Add.apply(x, *pending, plan)


def norm_pending(x: Tensor, pending: Pending, norm: nn.LayerNorm, plan: Plan) -> Tensor:
    """The LayerNorm of the complete stream [T, D]; x is overwritten where no gradient is recorded."""
    if torch.is_grad_enabled():
        return _AddNorm.apply(*_beginning(x, pending, norm, None, plan))
    return _begin_without_gradient(x, pending, norm, None, plan)[1]
