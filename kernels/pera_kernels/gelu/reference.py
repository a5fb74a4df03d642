"""Definition of gelu in plain PyTorch."""

import torch
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """``x * Phi(x)`` with the normal distribution's Phi, in float32 or float64, rounded once; differentiable."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (0.5 * wide * torch.special.erfc(-wide * 2**-0.5)).to(x.dtype)
