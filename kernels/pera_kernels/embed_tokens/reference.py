"""Definition of embed_tokens in plain PyTorch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def embed_tokens(
    rows: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    pos: Tensor | Sequence[Tensor],
    cls: Tensor,
    index: Tensor | Sequence[Tensor],
) -> Tensor:
    """See ``pera_kernels.embed_tokens``; differentiable in weight, bias, pos, cls and rows."""
    groups = ([x] if isinstance(x, Tensor) else x for x in (rows, pos, index))
    return torch.cat([_group(x, weight, bias, p, cls, i) for x, p, i in zip(*groups, strict=True)])


def _group(rows: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, cls: Tensor, index: Tensor) -> Tensor:
    n_seq, n_visible = index.shape
    patches = F.linear(rows, weight.to(rows.dtype), bias.to(rows.dtype)).view(n_seq, n_visible, weight.shape[0])
    patches = patches + pos[1 + index.long()].to(rows.dtype)
    first = (cls + pos[0]).to(rows.dtype).expand(n_seq, 1, -1)
    return torch.cat([first, patches], dim=1).flatten(0, 1)
