"""Definition of query_attention in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..packing import pairs, split


def query_attention(q: Tensor, kv: Tensor, num_heads: int, queries: Sequence[int], groups: Sequence[int]) -> Tensor:
    """See ``pera_kernels.query_attention``; differentiable in q and kv."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    asked = [x for (n, _), count in zip(pairs(groups), queries, strict=True) for x in (n, count)]
    parts = []
    for rows, both in zip(split(q, asked), split(kv, groups), strict=True):
        heads = rows.unflatten(-1, (num_heads, -1)).transpose(1, 2).to(wide)
        k, v = both.unflatten(-1, (2, num_heads, -1)).permute(2, 0, 3, 1, 4).to(wide)
        p = (heads @ k.transpose(-2, -1) * k.shape[-1] ** -0.5).softmax(-1)
        parts.append((p @ v).transpose(1, 2).flatten(0, 1).flatten(1).to(q.dtype))
    return torch.cat(parts)
