"""The GPUs on which one kernel for product and GELU was measured to be at least 5 % faster than two.

The two are cuBLAS's product and the kernel of ``pera_kernels.gelu``. They run where this table has no row: by what is
computed, and by compute capability.
"""

H200 = "H200, torch 2.11.0+cu130, bfloat16, 2026-11-26, bench/results/gpu/linear_gelu/2-h200-2d9b0ae.json"

FASTER: dict[str, dict[tuple[int, int], str]] = {
    "gelu(h)": {(9, 0): f"{H200}: 656 us, two kernels 698"},
    "gelu(h), h": {},  # 449 us at best, two kernels 391
    "gradient": {},  # 460 us at best, two kernels 472
}
