"""cls_attention: a few small products, a group of sequences at a time, on any device.

One query a sequence needs no keys and no values: with scores ``q (W_k x + b_k)``, the query can meet the weight first,
``(q W_k) x``, and ``q b_k`` is the same for all tokens, so softmax drops it. Likewise the values: the mean of
``W_v x + b_v`` is ``W_v`` of the mean of x, plus ``b_v``. What is left reads x twice and nothing else of its size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend
from ..packing import num_tokens, pairs, split
from ..products import in_dtype, linear, product_dtype
from .reference import cls_attention as definition

backend.register("cls_attention", "products")

WORTH = 16  # tokens of a sequence, at the fewest: below, keys and values are as small as the query's own products


def takes(groups: Sequence[int]) -> bool:
    """Whether this is less work than keys and values of all tokens."""
    return num_tokens(groups) >= WORTH * sum(n for n, _ in pairs(groups))


def _scores(x: Tensor, query: Tensor) -> Tensor:
    """``x query'`` [n, length, H] in float32, or float64 for float64."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        return torch.ops.aten.bmm.dtype(x, query.transpose(1, 2), torch.float32)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.bmm(x.to(wide), query.to(wide).transpose(1, 2))


def _group(x: Tensor, weight: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    """The result [n, D] of one group x [n, length, D]."""
    n, _, dim = x.shape
    dtype = product_dtype(x.dtype, x.device)
    matrix = in_dtype(weight, dtype)
    key, value = (matrix[i * dim : (i + 1) * dim].view(num_heads, -1, dim) for i in (1, 2))  # [H, d, D]
    query = linear(x[:, 0], weight, bias, slice(0, dim)).to(dtype).view(n, num_heads, -1).transpose(0, 1)  # [H, n, d]
    query = torch.bmm(query, key).transpose(0, 1)  # [n, H, D]
    scores = _scores(x, query.to(x.dtype) if x.is_cuda else query)
    p = (scores * (dim // num_heads) ** -0.5).softmax(1).to(dtype)
    mean = torch.bmm(p.transpose(1, 2), x.to(dtype))  # [n, H, D]
    out = torch.bmm(mean.transpose(0, 1), value.transpose(1, 2))  # [H, n, d]
    return out.transpose(0, 1).reshape(n, dim).add_(in_dtype(bias, dtype)[2 * dim :]).to(x.dtype)


def cls_attention(x: Tensor, weight: Tensor, bias: Tensor, num_heads: int, groups: Sequence[int]) -> Tensor:
    """Attention of the first token of each packed sequence over the sequence, from the tokens before projection.

    Equal to projecting all tokens to queries, keys and values and reading the attention's result at the first
    tokens, up to rounding. Not differentiable where ``weight`` or ``bias`` have a compute copy.

    Args:
        x: packed tokens [T, D], contiguous.
        weight: [3 * D, D] of the projection to queries, keys and values; cast to the dtype of products.
        bias: [3 * D]; cast.
        num_heads: heads H; H divides D.
        groups: [n0, len0, n1, len1, ...], see ``pera_kernels.packing``; no sequence is empty.

    Returns:
        [sum(n), D] in the dtype of x. Scores and softmax are float32 (float64 for float64).

    Raises:
        ValueError: x, weight and groups do not fit together.
    """
    dim = x.shape[-1]
    if x.shape != (num_tokens(groups), dim) or weight.shape != (3 * dim, dim) or dim % num_heads:
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)}: do not fit groups {list(groups)}, {num_heads} heads"
        )
    if backend.choose("cls_attention", x.device) == backend.REFERENCE:
        return definition(x, weight, bias, num_heads, groups)
    parts = [_group(part, weight, bias, num_heads) for part in split(x, groups) if part.numel()]
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else x.new_empty(0, dim)
