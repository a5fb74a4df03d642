"""Definition of cls_attention in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..packing import split


def cls_attention(x: Tensor, weight: Tensor, bias: Tensor, num_heads: int, groups: Sequence[int]) -> Tensor:
    """See ``pera_kernels.cls_attention``: the projections of all tokens, then the attention of the first."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    parts = []
    for part in split(x.to(wide), groups):
        qkv = torch.nn.functional.linear(part, weight.to(wide), bias.to(wide))
        q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        p = (q[:, :, :1] @ k.transpose(-2, -1) * k.shape[-1] ** -0.5).softmax(-1)
        parts.append((p @ v).transpose(1, 2).flatten(0, 1).flatten(1).to(x.dtype))
    return torch.cat(parts)
