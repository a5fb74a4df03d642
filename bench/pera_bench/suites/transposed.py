"""`transposed`: the gradients of fc1 and fc2, of which a CPU with AMX takes a copy before the weights' gradients."""

from pera_bench.point import Point
from pera_bench.work import FORWARD, Cost, Work
from pera_kernels.packing import kept_groups, num_tokens
from pera_kernels.transposed import reference, transposed

IMPLEMENTATIONS = "transposed"
CASES = {"fc1": (FORWARD,), "fc2": (FORWARD,)}


def make(point: Point, case: str) -> Work:
    """The matrix is read once and written once."""
    groups = point.groups("student_late")
    tokens = num_tokens(kept_groups(groups, point.keep(groups)[1]))
    x = point.normal(tokens, (4 if case == "fc1" else 1) * point.dim)
    return Work(
        op="transposed",
        call=transposed,
        reference=reference.transposed,
        arguments=(x,),
        learned=(),
        forward=Cost(2 * x.nbytes),
    )
