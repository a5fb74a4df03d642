"""Native kernels of gelu, called as the Triton ones are."""

import torch
from torch import Tensor

from ..isa import Isa, isa

__all__ = ["gelu", "gelu_backward_"]


def gelu(x: Tensor, out: Tensor) -> Tensor:
    """Fills out, which may be x; both contiguous. Returns it."""
    torch.ops.pera_native.gelu(x, out, isa() >= Isa.AVX512)
    return out


def gelu_backward_(
    grad: Tensor,  # [R, C], overwritten
    x: Tensor,  # [R, C]
    with_out: bool,
) -> tuple[Tensor, Tensor]:
    """gelu(x) [R, C], or no rows without ``with_out``; column sums [C] float32 of the gradient of x."""
    out = torch.empty_like(x) if with_out else x.new_empty(0, x.shape[1])
    return out, torch.ops.pera_native.gelu_backward_(grad, x, out, isa() >= Isa.AVX512)
