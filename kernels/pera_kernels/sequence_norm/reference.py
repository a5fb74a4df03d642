"""Definition of sequence_norm in plain PyTorch."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ..packing import gather


def sequence_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    keep: Tensor | None,
    groups: Sequence[int],
    kept_counts: Sequence[int],
) -> Tensor:
    """See ``pera_kernels.sequence_norm``; differentiable in x, weight and bias."""
    x = gather(x, keep, groups, kept_counts)
    wide = x.double() if x.dtype.itemsize == 8 else x.float()
    return F.layer_norm(wide, x.shape[1:], weight.to(wide.dtype), bias.to(wide.dtype), eps).to(x.dtype)
