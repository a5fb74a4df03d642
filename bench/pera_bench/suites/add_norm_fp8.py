"""`add_norm_fp8` on the teacher's stream: a branch's result into it, and the next norm in FP8.

The error is that of the scales.
"""

import torch
from torch import Tensor

from pera_bench.point import Point
from pera_bench.work import FORWARD, Cost, Work
from pera_kernels.add_norm_fp8 import add_norm_fp8_, reference
from pera_kernels.packing import num_tokens

IMPLEMENTATIONS = "add_norm_fp8"
CASES = {"teacher": (FORWARD,)}


def make(point: Point, case: str) -> Work:
    """Stream and branch read, the stream written; a byte a value and 4 bytes a row."""
    tokens = num_tokens(point.groups(case))
    x, y = (point.normal(tokens, point.dim, seed=seed) for seed in (0, 1))
    bias, weight, shift = (point.normal(point.dim, dtype=torch.float32, seed=seed) for seed in (2, 3, 4))
    stream = torch.empty_like(x)

    def call(x: Tensor, y: Tensor, y_bias: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
        # Restored, as it is overwritten: a pass that a block does not make.
        return add_norm_fp8_(stream.copy_(x), y, y_bias, weight, shift, 1e-6).scale

    def definition(x: Tensor, y: Tensor, y_bias: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
        return reference.add_norm_fp8(x, y, y_bias, weight, shift, 1e-6)[2]

    return Work(
        op="add_norm_fp8",
        call=call,
        reference=definition,
        arguments=(x, y, bias, weight, shift),
        learned=(),
        forward=Cost(moved=3 * x.nbytes + x.numel() + 4 * tokens),
    )
