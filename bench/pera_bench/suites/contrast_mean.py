"""`contrast_mean`: the mean gray of the crops that have contrast in their order."""

from pera_bench.point import Point
from pera_bench.suites.colors import make_view
from pera_bench.work import FORWARD, Cost, Work
from pera_kernels.visible_patches import contrast_mean, reference

IMPLEMENTATIONS = "contrast_mean"
CASES = {"global": (FORWARD,), "local": (FORWARD,)}


def make(point: Point, case: str) -> Work:
    """Reads every pixel of the crops with contrast, and writes next to nothing."""
    view = make_view(point, case)
    return Work(
        op="contrast_mean",
        call=lambda crops, order, factors: contrast_mean(crops, order, factors.float()),
        reference=lambda crops, order, factors: reference.contrast_mean(crops, order, factors, factors.dtype),
        arguments=(view.crops, view.order, view.factors),
        learned=(),
        forward=Cost(moved=view.with_contrast * view.crops[0].numel()),
        compiles="the definition reads each crop's order on the host",
    )
