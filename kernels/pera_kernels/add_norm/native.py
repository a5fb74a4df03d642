"""Native kernels of add_norm, called as the Triton ones are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..isa import Isa, isa
from .arguments import Norm, Subsets, kept

__all__ = ["add_norm", "add_norm_backward"]


def _lists(
    subsets: Subsets, has_add: bool = True
) -> tuple[Sequence[int], Tensor | None, Sequence[int], Tensor | None, Sequence[int]]:
    groups, add_subset, add_counts, norm_subset, norm_counts = subsets
    add_keep = kept(add_subset, add_counts) if has_add else None
    return groups, add_keep, add_counts, kept(norm_subset, norm_counts), norm_counts


def add_norm(
    x: Tensor,  # [T, D]
    y: Tensor,  # [Ra, D]
    y_bias: Tensor | None,  # [D]
    norm: Norm,
    subsets: Subsets,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward: the sum [T, D], which is x if ``inplace``, the normalised rows [Rn, D], mean and rstd [Rn] float32."""
    out = x if inplace else torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, *torch.ops.pera_native.add_norm(x, y, y_bias, *norm, *_lists(subsets), out, isa() >= Isa.AVX512)


def add_norm_backward(
    grad: Tensor | None,  # [T, D]
    grad_normed: Tensor | None,  # [Rn, D]
    x: Tensor,  # [T, D], the sum
    weight: Tensor | None,  # [D]
    mean: Tensor | None,  # [Rn] float32
    rstd: Tensor | None,  # [Rn] float32
    subsets: Subsets,
    has_add: bool,
    has_bias: bool,
) -> list[Tensor]:
    """Gradients: of x [T, D], of y [Ra, D] (empty without a subset: it is that of x), sums [3, D] float32."""
    norm, lists = (weight, mean, rstd), _lists(subsets, has_add)
    native = torch.ops.pera_native.add_norm_backward
    return list(native(grad, grad_normed, x, *norm, *lists, has_bias, isa() >= Isa.AVX512))
