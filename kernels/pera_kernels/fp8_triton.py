"""The scale of rows in e4m3, for Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def row_scale(largest):
    """For the largest magnitudes of rows: the scales to store, and what to multiply the rows by."""
    largest = tl.maximum(largest, 1e-30)  # fp8.SMALLEST; fp8.LARGEST is 448
    return largest * (1.0 / 448.0), 448.0 / largest
