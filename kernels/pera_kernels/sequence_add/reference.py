"""Definition of sequence_add in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..packing import kept_groups, pairs, split


def sequence_add(
    x: Tensor,
    y: Tensor,
    keep: Tensor | None,
    groups: Sequence[int],
    kept_counts: Sequence[int],
) -> Tensor:
    """See ``pera_kernels.sequence_add``; differentiable in x and y."""
    if keep is None:
        return x + y
    out = []
    ys = split(y, kept_groups(groups, kept_counts))
    keeps = keep.long().split(list(kept_counts))
    for part, branch, k, (n, _) in zip(split(x, groups), ys, keeps, pairs(groups), strict=True):
        out.append(part.index_add(0, k, branch, alpha=n / k.numel() if k.numel() else 0.0).flatten(0, 1))
    return torch.cat(out)
