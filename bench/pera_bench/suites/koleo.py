"""`koleo` on the prototype logits of the global crops' rows."""

from pera_bench.point import Point
from pera_bench.suites.distillation_loss import prototypes, unit_rows
from pera_bench.work import BOTH, FORWARD, Cost, Work
from pera_kernels.koleo import koleo, reference

IMPLEMENTATIONS = "koleo"
CASES = {"global": (FORWARD, BOTH)}


def make(point: Point, case: str) -> Work:
    """Forward by rows or by the Gram matrix, whichever has fewer FLOPs; prototypes read once or twice."""
    m, num_crops = point.cfg.model, point.cfg.views.num_global
    count = point.images * num_crops
    v, g = prototypes(point, 1)
    streamed, gram = 8 * count * v.numel(), 2 * m.bottleneck * v.numel()
    forward = Cost(v.nbytes, gram) if 4 * count >= m.bottleneck else Cost(2 * v.nbytes, streamed)
    return Work(
        op="koleo",
        call=koleo,
        reference=reference.koleo,
        arguments=(unit_rows(point, count, 0), v, g, num_crops),
        learned=(0, 1, 2),
        forward=forward,
        backward=Cost(2 * v.nbytes, streamed),
    )
