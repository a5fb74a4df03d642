"""`visible_patches`: coloured, normalised rows of what the student or the teacher sees."""

from pera_bench.point import Point
from pera_bench.suites.colors import make_view
from pera_bench.work import FORWARD, Cost, Work
from pera_kernels.visible_patches import reference, visible_patches

IMPLEMENTATIONS = "visible_patches"
CASES = {"student_global": (FORWARD,), "student_local": (FORWARD,), "teacher_global": (FORWARD,)}


def make(point: Point, case: str) -> Work:
    """Reads the visible patches' bytes and their numbers, writes their rows."""
    who, view_name = case.split("_")
    view = make_view(point, view_name, who)
    model, views = point.cfg.model, point.cfg.views
    values = view.index.numel() * model.patch_size**2 * model.in_chans
    constants = list(views.mean), list(views.std), model.patch_size, point.dtype
    return Work(
        op="visible_patches",
        call=visible_patches,
        reference=reference.visible_patches,
        arguments=(view.crops, view.index, view.order, view.factors, view.gray_mean(), *constants),
        learned=(),
        forward=Cost(moved=values * (1 + point.dtype.itemsize) + view.index.nbytes),
        compiles="the definition reads each crop's order on the host",
    )
