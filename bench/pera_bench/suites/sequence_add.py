"""`sequence_add`: a branch's result into the stream, with stochastic depth (without it, it is `x + y`)."""

from pera_bench.point import Point, nbytes
from pera_bench.work import BOTH, FORWARD, Cost, Work
from pera_kernels.packing import kept_groups, num_tokens
from pera_kernels.sequence_add import reference, sequence_add

IMPLEMENTATIONS = "sequence_add"
CASES = {"subset": (FORWARD, BOTH)}


def make(point: Point, case: str) -> Work:
    """Stream and branch read, stream written; back, the kept rows of the gradient read and written."""
    groups = point.groups("student_late")
    keep, kept_counts = point.keep(groups)
    x = point.normal(num_tokens(groups), point.dim)
    y = point.normal(num_tokens(kept_groups(groups, kept_counts)), point.dim, seed=1)
    return Work(
        op="sequence_add",
        call=sequence_add,
        reference=lambda x, y, groups, keep, kept_counts: reference.sequence_add(x, y, keep, groups, kept_counts),
        arguments=(x, y, groups, keep, kept_counts),
        learned=(0, 1),
        forward=Cost(moved=2 * x.nbytes + y.nbytes),
        backward=Cost(moved=2 * nbytes(y)),
    )
