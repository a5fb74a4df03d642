"""`gelu` on the hidden rows of the student's and the teacher's MLP."""

from pera_bench.point import Point
from pera_bench.work import BOTH, FORWARD, Cost, Work
from pera_kernels.gelu import gelu, reference
from pera_kernels.packing import kept_groups, num_tokens

IMPLEMENTATIONS = "gelu"
CASES = {"teacher": (FORWARD,), "student_late": (FORWARD, BOTH)}


def make(point: Point, case: str) -> Work:
    """Each value read and written once; back, it and its gradient read and one written."""
    groups = point.groups(case)
    if case != "teacher":
        groups = kept_groups(groups, point.keep(groups)[1])
    x = point.normal(num_tokens(groups), int(point.dim * point.cfg.model.mlp_ratio))
    return Work(
        op="gelu",
        call=gelu,
        reference=reference.gelu,
        arguments=(x,),
        learned=(0,),
        forward=Cost(moved=2 * x.nbytes),
        backward=Cost(moved=3 * x.nbytes),
    )
