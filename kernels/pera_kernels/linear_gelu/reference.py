"""Definition of linear_gelu in plain PyTorch."""

import torch
from torch import Tensor


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See ``pera_kernels.linear_gelu``; the sum and the GELU in float32 (float64 for float64)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    hidden = torch.nn.functional.linear(x.to(wide), weight.to(wide), bias.to(wide))
    return torch.nn.functional.gelu(hidden).to(x.dtype)
