"""Fits a line to the peaks of some batch sizes, and finds the largest batch that fits a card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pera_fast.profile.points import Point, Variant

CARDS = (16, 24, 40, 48, 80, 141, 192)  # GB on the box
# A card's GB are counted as 10^9 bytes: the least that is sold under that number (some makers mean GiB, and error
# correction takes the difference). Of that, a share and a fixed part are kept free. Neither is measured here: they are
# what is set aside for the CUDA context and libraries, and for the allocator's rounding and gaps.
GB = 10**9
CONTEXT = GB
FRAGMENTATION = 0.05
SLOPE_TOLERANCE = 0.10  # that simulate is held to


@dataclass(frozen=True)
class MemoryFit:
    """peak = fixed + slope * batch, in bytes.

    Attributes:
        fixed: bytes at batch 0.
        slope: bytes per image.
        deviation: largest distance of a point from the line over that point's peak; 0 for two points.
        points: how many there were.
    """

    fixed: float
    slope: float
    deviation: float = 0.0
    points: int = 2

    def at(self, batch_size: float) -> float:
        """Predicted peak."""
        return self.fixed + self.slope * batch_size

    def largest_batch(self, available: float) -> int | None:
        """Largest batch whose predicted peak is at most so many bytes; None if it does not grow with the batch."""
        if self.slope <= 0:
            return None
        return max(int((available - self.fixed) // self.slope), 0)


def usable(card: float, gaps_counted: bool = False) -> float:
    """Bytes of a card of so many GB that a step's peak may take.

    Args:
        gaps_counted: the peak is of what the allocator held, its gaps among it, so no share is kept free for them.
    """
    return card * GB * (1 if gaps_counted else 1 - FRAGMENTATION) - CONTEXT


def fit_line(batches: Sequence[int], peaks: Sequence[float]) -> MemoryFit | None:
    """Least squares through (batch size, bytes); None for fewer than two batch sizes."""
    if len(set(batches)) < 2:
        return None
    x, y = np.asarray(batches, dtype=float), np.asarray(peaks, dtype=float)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    fixed = float(y.mean() - slope * x.mean())
    deviation = float(np.max(np.abs(fixed + slope * x - y) / y))
    return MemoryFit(fixed, slope, deviation, len(x))


def fit_points(points: Sequence[Point], what: str = "peak") -> MemoryFit | None:
    """The line through the points that ran; ``what``: peak or reserved.

    A simulated peak is the largest of several moments of a step, each a line over the batch: it bends upwards until the
    moment with the steepest line has won. So there the two largest batches say how it goes on. Measured peaks scatter:
    least squares.
    """
    ran = sorted((p for p in points if p.ok), key=lambda p: p.batch_size)
    if ran and ran[0].device == "simulate":
        ran = ran[-2:]
    return fit_line([p.batch_size for p in ran], [getattr(p, what) for p in ran])


def largest_batch(points: Sequence[Point], available: float, what: str = "peak") -> int | None:
    """Largest batch of a variant whose peak is at most so many bytes, None without a line.

    Between simulated points the peak is taken from the chord, which lies above it; beyond them from the line's end.
    """
    line = fit_points(points, what)
    ran = sorted((p for p in points if p.ok), key=lambda p: p.batch_size)
    if line is None or ran[0].device != "simulate" or not ran[0].peak < available < ran[-1].peak:
        return None if line is None else line.largest_batch(available)
    return int(np.interp(available, [p.peak for p in ran], [p.batch_size for p in ran]))


def by_variant(points: Sequence[Point]) -> dict[Variant, list[Point]]:
    """Points in the order of their variants."""
    points_of: dict[Variant, list[Point]] = {}
    for point in points:
        points_of.setdefault(point.variant, []).append(point)
    return points_of


@dataclass(frozen=True)
class Claim:
    """Sparse against dense masking, everything else equal: the method's claim (docs/method.md section 1) as numbers.

    Attributes:
        sparse_slope, dense_slope: bytes per image.
        sparse_flops, dense_flops: per image and step.
        sparse_rate, dense_rate: most images per second over the batch sizes that both ran; None if not measured.
    """

    recipe: str
    policy: str
    sparse_slope: float
    dense_slope: float
    sparse_flops: float
    dense_flops: float
    sparse_rate: float | None = None
    dense_rate: float | None = None

    @property
    def memory(self) -> float:
        """Memory of an image without masks over that with masks."""
        return self.dense_slope / self.sparse_slope

    @property
    def flops(self) -> float:
        """FLOPs of an image without masks over those with masks."""
        return self.dense_flops / self.sparse_flops

    @property
    def speed(self) -> float | None:
        """Speed-up of a step by masks, None if not measured."""
        return self.sparse_rate / self.dense_rate if self.sparse_rate and self.dense_rate else None

    def __str__(self) -> str:
        speed = "" if self.speed is None else f", {self.speed:.2f}x the images per second"
        return (
            f"{self.recipe}, recompute {self.policy}: with the method's masks an image takes"
            f" {self.sparse_slope / 2**20:.1f} MiB, without masks {self.dense_slope / 2**20:.1f} MiB:"
            f" {self.memory:.2f}x less memory an image; {self.sparse_flops / 1e9:.0f} against"
            f" {self.dense_flops / 1e9:.0f} GFLOP: {self.flops:.2f}x fewer FLOPs{speed}"
        )


def claims(points: Sequence[Point]) -> list[Claim]:
    """For each recipe whose masks were left out too, what they save."""
    points_of = by_variant(points)
    found = []
    for variant, dense in points_of.items():
        if variant.purpose != "dense":
            continue
        policy = variant.config(1).model.recompute
        for other, sparse in points_of.items():
            if other.purpose != "policy" or other.recipe != variant.recipe:
                continue
            if other.config(1).model.recompute != policy:
                continue
            lines = fit_points(sparse), fit_points(dense)
            if lines[0] is None or lines[1] is None or lines[0].slope <= 0:
                continue
            flops = next(p.flops_per_image for p in sparse if p.ok), next(p.flops_per_image for p in dense if p.ok)
            found.append(
                Claim(variant.recipe, policy, lines[0].slope, lines[1].slope, *flops, *_best_rates(sparse, dense))
            )
    return found


def _best_rates(sparse: Sequence[Point], dense: Sequence[Point]) -> tuple[float | None, float | None]:
    rates = [{p.batch_size: p.images_per_s for p in points if p.ok and p.images_per_s} for points in (sparse, dense)]
    both = rates[0].keys() & rates[1].keys()
    if not both:
        return None, None
    return max(rates[0][b] for b in both), max(rates[1][b] for b in both)


@dataclass(frozen=True)
class Comparison:
    """Slope of a variant's memory, simulated and measured, in bytes per image."""

    variant: Variant
    simulated: float
    measured: float

    @property
    def ratio(self) -> float:
        """Simulated over measured."""
        return self.simulated / self.measured

    @property
    def within(self) -> bool:
        """Whether simulate is as close as it is held to be."""
        return abs(self.ratio - 1) <= SLOPE_TOLERANCE


def compare_simulated(measured: Sequence[Point], simulated: Sequence[Point]) -> list[Comparison]:
    """Slopes of each variant that was both measured and simulated, over the batch sizes that ran on both sides."""
    theirs = by_variant(simulated)
    found = []
    for variant, points in by_variant(measured).items():
        sizes = {p.batch_size for p in points if p.ok} & {p.batch_size for p in theirs.get(variant, []) if p.ok}
        lines = [fit_points([p for p in side if p.batch_size in sizes]) for side in (theirs.get(variant, []), points)]
        if lines[0] is not None and lines[1] is not None and lines[1].slope > 0:
            found.append(Comparison(variant, lines[0].slope, lines[1].slope))
    return found
