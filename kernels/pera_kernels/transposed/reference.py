"""Definition of transposed in plain PyTorch."""

import torch
from torch import Tensor


def transposed(x: Tensor) -> Tensor:
    """See ``pera_kernels.transposed``."""
    return x.t().clone(memory_format=torch.contiguous_format)
