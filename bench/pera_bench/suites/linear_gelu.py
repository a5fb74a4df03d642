"""`linear_gelu`: the first layer of the MLP with its activation."""

from torch import Tensor

from pera_bench.point import Point
from pera_bench.work import FORWARD, Cost, Work
from pera_kernels.linear_gelu import linear_gelu, reference
from pera_kernels.packing import num_tokens

IMPLEMENTATIONS = "linear_gelu"
CASES = {"teacher": (FORWARD,)}


def make(point: Point, case: str) -> Work:
    """One product; tokens, weight and result once."""
    dim, tokens = point.dim, num_tokens(point.groups(case))
    width = int(dim * point.cfg.model.mlp_ratio)
    x, weight = point.normal(tokens, dim), point.normal(width, dim, seed=1) * dim**-0.5
    bias = point.normal(width, seed=2)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_gelu(x, weight, bias)[0]

    return Work(
        op="linear_gelu",
        call=call,
        reference=reference.linear_gelu,
        arguments=(x, weight, bias),
        learned=(),
        forward=Cost(x.nbytes + weight.nbytes + tokens * width * x.itemsize, 2 * tokens * width * dim),
    )
