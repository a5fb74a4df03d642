"""Definition of quantize_rows in plain PyTorch."""

import torch
from torch import Tensor

from ..fp8 import E4M3, LARGEST, SMALLEST


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """See ``pera_kernels.quantize_rows``: values [R, C] in e4m3, scales [R, 1] in float32 (float64 for float64)."""
    wide = x if x.dtype == torch.float64 else x.float()
    scale = wide.abs().amax(1, keepdim=True).clamp(min=SMALLEST) / LARGEST
    return (wide / scale).to(E4M3), scale
