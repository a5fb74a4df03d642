"""Points as a run would have found them, on a line that the test knows."""

from pera_fast.profile.points import Point, Variant
from pera_fast.profile.tables import Profile

GIB = 2**30
SPARSE = Variant("tiny", ("model.recompute=none",))
DENSE = Variant("tiny", ("model.recompute=none", "model.masking=none"), "dense")
SMALL = ["model.embed_dim=64", "model.depth=2", "model.prototypes=256", "model.head_hidden=64", "model.bottleneck=32"]


def line(
    variant: Variant, device: str, fixed: float, slope: float, sizes: tuple[int, ...] = (8, 16, 32)
) -> list[Point]:
    """Points at fixed + slope * batch GiB; a real device does 100 images per second, half of that without masks."""
    rate = 50.0 if variant.purpose == "dense" else 100.0
    points = []
    for size in sizes:
        peak = round((fixed + slope * size) * GIB)
        p = Point(variant, size, device, 3, "ok", "", peak, peak, between_steps=GIB, flops_per_image=1e9)
        if device == "simulate":
            p.at_peak = {"weights": GIB, "student mlp": peak - GIB}
        else:
            p.images_per_s, p.step_seconds = rate, [size / rate, size / rate / 1.1, size / rate / 0.9]
        points.append(p)
    return points


def synthetic(device: str) -> Profile:
    """Sparse: 2 + 0.1 * batch GiB; dense: 2 + 0.4 * batch GiB, out of memory at 32."""
    points = [*line(SPARSE, device, 2, 0.1), *line(DENSE, device, 2, 0.4)]
    points[-1] = Point(DENSE, 32, device, status="out of memory", note="tried to allocate 7 GiB")
    return Profile({"device": device, "device_name": "a <test> device", "torch": "2"}, points, [8, 16, 32])
