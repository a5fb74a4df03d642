"""`cls_attention`: the teacher's last attention, of each sequence's cls token, with its projections."""

from torch import Tensor

from pera_bench.point import Point
from pera_bench.work import FORWARD, Cost, Work
from pera_kernels.cls_attention import cls_attention, reference
from pera_kernels.packing import num_tokens, pairs

IMPLEMENTATIONS = "cls_attention"
CASES = {"teacher": (FORWARD,)}


def make(point: Point, case: str) -> Work:
    """Per query and head, products with W_k, with all tokens twice, and with W_v; the tokens are read twice."""
    groups, dim, heads = point.groups(case), point.dim, point.cfg.model.num_heads
    x = point.normal(num_tokens(groups), dim)
    weight, bias = point.normal(3 * dim, dim, seed=1) * dim**-0.5, point.normal(3 * dim, seed=2)
    count = sum(n for n, _ in pairs(groups))

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return cls_attention(x, weight, bias, heads, groups)

    return Work(
        op="cls_attention",
        call=call,
        reference=lambda x, weight, bias: reference.cls_attention(x, weight, bias, heads, groups),
        arguments=(x, weight, bias),
        learned=(),
        forward=Cost(2 * x.nbytes + weight.nbytes, 6 * count * dim * dim + 4 * heads * dim * x.shape[0]),
    )
