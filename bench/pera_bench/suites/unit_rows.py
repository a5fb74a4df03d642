"""`unit_rows`: the bottleneck rows of the student's predicted patches, scaled to unit length."""

from pera_bench.point import Point
from pera_bench.work import BOTH, FORWARD, Cost, Work
from pera_kernels.unit_rows import reference, unit_rows

IMPLEMENTATIONS = "unit_rows"
CASES = {"predicted": (FORWARD, BOTH)}
EPS = 1e-6


def make(point: Point, case: str) -> Work:
    """Rows read and written; backward reads both and writes one."""
    del case
    rows = point.images * point.cfg.views.num_global * point.seen("global", "predicted")
    x = point.normal(rows, point.cfg.model.bottleneck)
    return Work(
        op="unit_rows",
        call=lambda x: unit_rows(x, EPS),
        reference=lambda x: reference.unit_rows(x, EPS),
        arguments=(x,),
        learned=(0,),
        forward=Cost(2 * x.nbytes),
        backward=Cost(3 * x.nbytes),
    )
