"""Definition of gelu_fp8 in plain PyTorch."""

from torch import Tensor

from ..gelu.reference import gelu
from ..quantize_rows.reference import quantize_rows


def gelu_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """See ``pera_kernels.gelu_fp8``: values [R, C] in e4m3, scales [R, 1]; half types are widened before the GELU."""
    return quantize_rows(gelu(x.double() if x.dtype.itemsize == 8 else x.float()))
