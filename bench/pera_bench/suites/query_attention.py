"""`query_attention`: the last block's attention, of the rows that are read over all tokens."""

from torch import Tensor

from pera_bench.point import Point
from pera_bench.work import BOTH, FORWARD, Cost, Work
from pera_kernels.packing import kept_groups, num_tokens, pairs
from pera_kernels.query_attention import query_attention, reference

IMPLEMENTATIONS = "query_attention"
CASES = {"teacher": (FORWARD,), "student_late": (FORWARD, BOTH)}


def make(point: Point, case: str) -> Work:
    """Products of [queries, d] x [d, len], 2 a head forward and 5 backward."""
    groups, queries = point.groups(case), [1, 1]
    if case != "teacher":
        groups = kept_groups(groups, point.keep(groups)[1])
        queries[0] += point.seen("global", "predicted")
    asked = sum(n * count for (n, _), count in zip(pairs(groups), queries, strict=True))
    q, kv = point.normal(asked, point.dim), point.normal(num_tokens(groups), 2 * point.dim, seed=1)
    heads = point.cfg.model.num_heads
    lengths = zip(pairs(groups), queries, strict=True)
    product = 2 * point.dim * sum(n * length * count for (n, length), count in lengths)

    def call(q: Tensor, kv: Tensor) -> Tensor:
        return query_attention(q, kv, heads, queries, groups)[0]

    return Work(
        op="query_attention",
        call=call,
        reference=lambda q, kv: reference.query_attention(q, kv, heads, queries, groups),
        arguments=(q, kv),
        learned=(0, 1),
        forward=Cost(2 * q.nbytes + kv.nbytes, 2 * product),
        backward=Cost(3 * q.nbytes + 2 * kv.nbytes, 5 * product),
    )
