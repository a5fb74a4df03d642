"""Where one kernel for product and GELU was measured to beat cuBLAS's product and a GELU kernel by 5 % or more.

By op and compute capability, with the source. One without a row has no such measurement: there the product and the GELU
are two kernels.
"""

FASTER: dict[str, dict[tuple[int, int], str]] = {"linear_gelu": {}, "linear_gelu_backward": {}}
