"""`gelu_fp8` on the hidden rows of the teacher's MLP. The error is that of the scales."""

from torch import Tensor

from pera_bench.point import Point
from pera_bench.work import FORWARD, Work
from pera_kernels.gelu_fp8 import gelu_fp8, reference
from pera_kernels.packing import num_tokens

IMPLEMENTATIONS = "gelu_fp8"
CASES = {"teacher": (FORWARD,)}


def make(point: Point, case: str) -> Work:
    """Each value read, a byte written for it; 4 bytes a row."""
    x = point.normal(num_tokens(point.groups(case)), int(point.dim * point.cfg.model.mlp_ratio))

    def call(x: Tensor) -> Tensor:
        return gelu_fp8(x).scale

    def definition(x: Tensor) -> Tensor:
        return reference.gelu_fp8(x)[1]

    return Work.quantizing("gelu_fp8", call, definition, x)
