"""`column_sums`: the gradient of the last block's bias of keys and values."""

from pera_bench.point import Point
from pera_bench.work import FORWARD, Cost, Work
from pera_kernels.column_sums import column_sums, reference
from pera_kernels.packing import kept_groups, num_tokens

IMPLEMENTATIONS = "column_sums"
CASES = {"student_late": (FORWARD,)}


def make(point: Point, case: str) -> Work:
    """The matrix is read once."""
    groups = point.groups(case)
    x = point.normal(num_tokens(kept_groups(groups, point.keep(groups)[1])), 2 * point.dim)
    return Work(
        op="column_sums",
        call=column_sums,
        reference=reference.column_sums,
        arguments=(x,),
        learned=(),
        forward=Cost(x.nbytes),
    )
