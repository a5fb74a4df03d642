"""Native kernels of sequence_norm, called as the Triton ones are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..isa import Isa, isa

__all__ = ["sequence_norm", "sequence_norm_backward"]


def sequence_norm(
    x: Tensor,  # [T, D]
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
    eps: float,
    keep: Tensor | None,
    groups: Sequence[int],
    kept_counts: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised rows [R, D]; their means and reciprocal deviations [R] float32."""
    native = torch.ops.pera_native.sequence_norm
    return native(x, weight, bias, eps, keep, groups, kept_counts, isa() >= Isa.AVX512)


def sequence_norm_backward(
    grad: Tensor,  # [R, D]
    x: Tensor,  # [T, D]
    weight: Tensor,  # [D]
    mean: Tensor,  # [R] float32
    rstd: Tensor,  # [R] float32
    keep: Tensor | None,
    groups: Sequence[int],
    kept_counts: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [T, D], weight and bias [D]."""
    native = torch.ops.pera_native.sequence_norm_backward
    return native(grad, x, weight, mean, rstd, keep, groups, kept_counts, isa() >= Isa.AVX512)
