"""Where one kernel for product and GELU was measured to beat cuBLAS's product and a GELU kernel by 5 % or more.

A compute capability without a row has no such measurement: there the product and the GELU are two kernels.
"""

FASTER: dict[tuple[int, int], str] = {}
