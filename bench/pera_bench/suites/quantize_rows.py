"""`quantize_rows` of the teacher's attention, for the projection in FP8. The error is that of the scales."""

from torch import Tensor

from pera_bench.point import Point
from pera_bench.work import FORWARD, Work
from pera_kernels.packing import num_tokens
from pera_kernels.quantize_rows import quantize_rows, reference

IMPLEMENTATIONS = "quantize_rows"
CASES = {"teacher": (FORWARD,)}


def make(point: Point, case: str) -> Work:
    """Each value read, a byte written for it; 4 bytes a row."""
    x = point.normal(num_tokens(point.groups(case)), point.dim)

    def call(x: Tensor) -> Tensor:
        return quantize_rows(x).scale

    def definition(x: Tensor) -> Tensor:
        return reference.quantize_rows(x)[1]

    return Work.quantizing("quantize_rows", call, definition, x)
