"""`pixel_loss`: predicted pixels of a step's global crops against the student view's own."""

from pera_bench.point import Point
from pera_bench.suites.colors import make_view
from pera_bench.work import BOTH, FORWARD, Cost, Work
from pera_kernels.pixel_loss import pixel_loss, reference

IMPLEMENTATIONS = "pixel_loss"
CASES = {"color": (FORWARD, BOTH), "plain": (FORWARD, BOTH)}


def make(point: Point, case: str) -> Work:
    """Forward reads predictions and their pixels; backward reads both again and writes the gradient."""
    view, model, views = make_view(point, "global", "predicted"), point.cfg.model, point.cfg.views
    colors = (view.order, view.factors, view.gray_mean()) if case == "color" else (None, None, None)
    pred = point.normal(view.index.numel(), model.patch_size**2 * model.in_chans)
    read = pred.numel() * (pred.element_size() + 1)
    return Work(
        op="pixel_loss",
        call=pixel_loss,
        reference=reference.pixel_loss,
        arguments=(pred, view.crops, view.index, *colors, list(views.mean), list(views.std), model.patch_size),
        learned=(0,),
        forward=Cost(moved=read),
        backward=Cost(moved=read + pred.nbytes),
        compiles="the definition reads each crop's order on the host" if case == "color" else None,
    )
