"""Definition of attention in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..packing import split


def attention(qkv: Tensor, num_heads: int, groups: Sequence[int]) -> Tensor:
    """See ``pera_kernels.attention``; differentiable in qkv."""
    head_dim = qkv.shape[1] // (3 * num_heads)
    out = []
    for part in split(qkv, groups):
        n, length, _ = part.shape
        # (n, len, 3, H, d) -> 3 x (n, H, len, d)
        q, k, v = part.view(n, length, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4)
        wide = q.dtype if q.dtype == torch.float64 else torch.float32
        scores = q.to(wide) @ k.to(wide).transpose(-2, -1) * head_dim**-0.5
        y = scores.softmax(dim=-1) @ v.to(wide)
        out.append(y.to(qkv.dtype).transpose(1, 2).reshape(n * length, num_heads * head_dim))
    return torch.cat(out)
