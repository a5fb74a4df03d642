"""`attention` on the sequences of a step's teacher and student.

`triton` runs its kernels on groups of short sequences and the best other implementation on the long ones; the `_local`
cases hold short sequences only and are what `op.SHORT_SEQUENCE` is to be set by.
"""

from pera_bench.point import Point
from pera_bench.work import BOTH, FORWARD, Cost, Work
from pera_kernels.attention import attention, reference
from pera_kernels.packing import kept_groups, num_tokens, pairs

IMPLEMENTATIONS = "attention"
CASES = {
    "teacher": (FORWARD,),
    "student": (FORWARD, BOTH),
    "student_late": (FORWARD, BOTH),
    "teacher_local": (FORWARD,),
    "student_local": (FORWARD, BOTH),
}


def make(point: Point, case: str) -> Work:
    """2 products of [len, d] x [d, len] a head forward, 5 backward; of the student, what stochastic depth keeps."""
    groups = point.groups(case)
    if not case.startswith("teacher"):
        groups = kept_groups(groups, point.keep(groups)[1])
    qkv = point.normal(num_tokens(groups), 3 * point.dim)
    product = 2 * point.dim * sum(n * length**2 for n, length in pairs(groups))
    return Work(
        op="attention",
        call=attention,
        reference=reference.attention,
        arguments=(qkv, point.cfg.model.num_heads, groups),
        learned=(0,),
        forward=Cost(qkv.nbytes // 3 * 4, 2 * product),
        backward=Cost(qkv.nbytes // 3 * 7, 5 * product),  # qkv and the gradient read, that of qkv written
    )
