"""Scales of rows in e4m3 for Triton kernels, and the longest row that they take."""

import triton
import triton.language as tl
from torch import Tensor

MAX_COLUMNS = 16384  # a row has to fit one block's registers
VALUES = 1024  # of a row, for each warp: 32 a thread


@triton.jit
def row_scale(largest):
    """For the largest magnitudes of rows: the scales to store, and what to multiply the rows by."""
    largest = tl.maximum(largest, 1e-30)  # fp8.SMALLEST; fp8.LARGEST is 448
    return largest * (1.0 / 448.0), 448.0 / largest


def why_not(x: Tensor) -> str | None:
    """Why kernels that keep a row in registers cannot take a matrix, or None."""
    if x.shape[1] > MAX_COLUMNS:
        return f"a row of {x.shape[1]} values does not fit one block (at most {MAX_COLUMNS})"
    return None
