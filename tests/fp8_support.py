"""Checks of rows in e4m3 against exact ones."""

import torch
from torch import Tensor

from pera_kernels import fp8

NAMES = ("reference", "composed", "triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What "composed" rounds before e4m3 does, and where the kernels' arithmetic is not PyTorch's.
ROUNDED = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}

TAIL = 1e-6  # absolute: the error of erf, where a GELU is next to nothing


def check(got: fp8.Rows, exact: Tensor, rounded: float) -> None:
    """Each value within half a step of e4m3 of the exact one, and what is rounded before; scales likewise.

    Half a step is 2^-4 of a number at most, and 2^-10 of the scale for the subnormal ones.
    """
    values, scale = got.values.cpu(), got.scale.cpu().double()
    assert (values.dtype, got.scale.dtype, scale.shape) == (fp8.E4M3, torch.float32, (exact.shape[0], 1))
    largest = exact.abs().amax(1, keepdim=True)
    torch.testing.assert_close(scale, largest / fp8.LARGEST, rtol=rounded, atol=TAIL / fp8.LARGEST)
    error = (values.double() * scale - exact).abs()
    assert (error <= exact.abs() * 2**-4 * 1.001 + scale * 2**-10 + rounded * largest + TAIL).all()
    # Rounding to the nearest has 2.6 % of the norm; dropping the rest would have twice that.
    assert error.norm() <= 0.027 * exact.norm() + rounded * largest.norm() * exact.shape[1] ** 0.5
