"""pera::query_attention: schema, shapes, gradient; PyTorch's fused attention for each group.

The last block needs a network's result for a few tokens of each sequence: all tokens are keys and values, those alone
are queries. It is one call a network and step, so it has no kernels of its own.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import backend, cost
from ..attention import cudnn, native, sdpa
from ..packing import num_tokens, pairs, split

backend.register("query_attention", "amx", available=native.amx.available)
backend.register("query_attention", "cudnn", available=cudnn.available)
backend.register("query_attention", "sdpa", available=sdpa.available)

SHORT = 32  # queries or tokens of a sequence that are too few for the tiles of fused kernels


def _asked(queries: Sequence[int], groups: Sequence[int]) -> list[int]:
    """The groups of the queries: [n0, queries0, n1, queries1, ...]."""
    return [x for (n, _), count in zip(pairs(groups), queries, strict=True) for x in (n, count)]


def _implementation(q: Tensor, num_heads: int, queries: int, length: int):
    """The implementation for a group, by the queries and the tokens of each sequence."""
    name = backend.choose("query_attention", q.device)
    # The checks read the width of packed projections, three times that of q.
    wide = q.new_empty(0, 3 * q.shape[1])
    if name == "amx" and native.amx.why_not(wide, num_heads) is None:
        return native.amx
    if name == "cudnn" and queries > SHORT and cudnn.why_not(wide, num_heads) is None:
        return cudnn
    if q.is_cuda and queries <= SHORT and length <= SHORT:
        return sdpa.formula  # the fused kernels' tiles are nearly empty: .3 ms for what is a few thousand values
    return sdpa.fused if name != "reference" and sdpa.fused.why_not(wide, num_heads) is None else sdpa.formula


def _parts(
    q: Tensor, kv: Tensor, num_heads: int, queries: Sequence[int], groups: Sequence[int]
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
    """For each group that is not empty: its rows in q, its rows in kv, and q, k, v as views [n, H, length, d]."""
    first_q = first_kv = 0
    for rows, both in zip(split(q, _asked(queries, groups)), split(kv, groups), strict=True):
        last_q, last_kv = first_q + rows.shape[0] * rows.shape[1], first_kv + both.shape[0] * both.shape[1]
        if rows.numel():
            k, v = sdpa.heads(both, num_heads, 2)
            yield slice(first_q, last_q), slice(first_kv, last_kv), sdpa.heads(rows, num_heads, 1)[0], k, v
        first_q, first_kv = last_q, last_kv


def _as_heads(x: Tensor, rows: slice, like: Tensor) -> Tensor:
    """Rows of packed x [T, D] as a view of the shape of ``like`` [n, H, length, d]."""
    n, num_heads, length, _ = like.shape
    return x[rows].view(n, length, num_heads, -1).transpose(1, 2)


@torch.library.custom_op("pera::query_attention", mutates_args=())
def _query_attention(
    q: Tensor, kv: Tensor, num_heads: int, queries: Sequence[int], groups: Sequence[int]
) -> tuple[Tensor, Tensor]:
    q, kv = q.contiguous(), kv.contiguous()
    out, lse = torch.empty_like(q), q.new_empty(q.shape[0], num_heads, dtype=_wide(q))
    for rows, _, query, k, v in _parts(q, kv, num_heads, queries, groups):
        y, sums = _implementation(q, num_heads, query.shape[2], k.shape[2]).forward_group(query, k, v)
        _as_heads(out, rows, query).copy_(y)
        lse[rows].view(query.shape[0], query.shape[2], num_heads).copy_(sums.transpose(1, 2))
    return out, lse


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@_query_attention.register_fake
def _(q, kv, num_heads, queries, groups):
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[0], num_heads, dtype=_wide(q))


@torch.library.custom_op("pera::query_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    queries: Sequence[int],
    groups: Sequence[int],
) -> list[Tensor]:
    grad, q, kv, out, lse = (t.contiguous() for t in (grad, q, kv, out, lse))
    grad_q = torch.empty_like(q)
    grad_kv = torch.empty_like(kv) if all(queries) else torch.zeros_like(kv)  # a group may have keys and no queries
    for rows, both, query, k, v in _parts(q, kv, num_heads, queries, groups):
        sums = lse[rows].view(query.shape[0], query.shape[2], num_heads).transpose(1, 2)
        result = _as_heads(out, rows, query)
        implementation = _implementation(q, num_heads, query.shape[2], k.shape[2])
        dq, dk, dv = implementation.backward_group(_as_heads(grad, rows, query), query, k, v, result, sums)
        _as_heads(grad_q, rows, query).copy_(dq)
        keys, values = sdpa.heads(grad_kv[both].view(k.shape[0], k.shape[2], -1), num_heads, 2)
        keys.copy_(dk)
        values.copy_(dv)
    return [grad_q, grad_kv]


@_backward.register_fake
def _(grad, q, kv, out, lse, num_heads, queries, groups):
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, kv)]


cost.opened("pera::query_attention", "pera::query_attention_backward")


def _setup_context(ctx, inputs, output) -> None:
    q, kv, ctx.num_heads, ctx.queries, ctx.groups = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, kv, out, lse)


def _autograd(ctx, grad: Tensor, _lse: Tensor):
    return *_backward(grad, *ctx.saved_tensors, ctx.num_heads, ctx.queries, ctx.groups), None, None, None


_query_attention.register_autograd(_autograd, setup_context=_setup_context)


def query_attention(
    q: Tensor, kv: Tensor, num_heads: int, queries: Sequence[int], groups: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Softmax attention of some tokens of each sequence over all of its tokens.

    Args:
        q: packed queries [sum(n * queries), D], a sequence's next to each other.
        kv: packed keys and values [T, 2 * D], each as heads x head_dim.
        num_heads: heads H; H divides D.
        queries: tokens of a sequence that ask, for each group.
        groups: [n0, len0, n1, len1, ...], see ``pera_kernels.packing``.

    Returns:
        [sum(n * queries), D] in the dtype of q, differentiable, and the log-sum-exp of each query's scores
        [sum(n * queries), H], float32 (float64 for float64).

    Raises:
        ValueError: q, kv and groups do not fit together.
    """
    if kv.shape != (num_tokens(groups), 2 * q.shape[1]) or q.shape[0] != num_tokens(_asked(queries, groups)):
        raise ValueError(
            f"q {tuple(q.shape)}, kv {tuple(kv.shape)} do not hold queries {list(queries)} of groups {list(groups)}"
        )
    return _query_attention(q, kv, num_heads, list(queries), list(groups))


def query_attention_backward(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    queries: Sequence[int],
    groups: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Gradients of q [sum(n * queries), D] and kv [T, 2 * D], from what ``query_attention`` took and returned."""
    grad_q, grad_kv = _backward(grad, q, kv, out, lse, num_heads, list(queries), list(groups))
    return grad_q, grad_kv
