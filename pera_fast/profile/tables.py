"""Tables of a profile for the terminal, for CSV and for the page."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pera_fast.profile.fits import (
    CARDS,
    GB,
    Claim,
    Comparison,
    MemoryFit,
    by_variant,
    claims,
    fit_line,
    fit_points,
    largest_batch,
    usable,
)
from pera_fast.profile.points import Point, Variant

MIB, GIB = 2**20, 2**30
VARIANT = "recipe, masks, recompute"  # what the words of Variant.name are
# What bytes at the peak belong to, in the order of the plots: see ``simulate.part``.
PARTS = (
    "weights", "optimiser state", "gradients", "weight copies", "crops", "student embed", "student stream",
    "student attention", "student mlp", "student cls head", "student pixel head", "teacher", "loss", "backward",
    "update", "other",
)  # fmt: skip
Rows = list[list[str]]


@dataclass
class Profile:
    """All that was found.

    Attributes:
        machine: device, versions, commit, date (``machine.describe``).
        points: in the order of the plan.
        sizes: batch sizes that were asked for; a simulated profile has points at a larger one too.
        comparisons: slopes, simulated against measured; only where both are there.
    """

    machine: dict[str, Any]
    points: list[Point]
    sizes: list[int]
    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def device(self) -> str:
        """simulate, cuda or cpu."""
        return str(self.machine["device"])

    @property
    def predicts(self) -> bool:
        """Whether its peaks say something about cards: a CPU process's resident memory does not."""
        return self.device != "cpu"

    @property
    def claims(self) -> list[Claim]:
        """Sparse against dense masking."""
        return claims(self.points)

    def fits(self) -> dict[Variant, MemoryFit]:
        """The line of each variant that ran at two batch sizes or more; simulated: its end, which predicts."""
        lines = {variant: fit_points(points) for variant, points in by_variant(self.points).items()}
        return {variant: line for variant, line in lines.items() if line is not None}

    def near(self, variant: Variant) -> MemoryFit | None:
        """The line through a variant's points at the batch sizes that were asked for, by least squares."""
        ran = [p for p in by_variant(self.points)[variant] if p.ok and p.batch_size in self.sizes]
        return fit_line([p.batch_size for p in ran], [p.peak for p in ran])

    def largest(self, variant: Variant, card: float) -> int | None:
        """Largest batch of a variant predicted to fit a card of so many GB."""
        on_card = self.device == "cuda"
        points = by_variant(self.points)[variant]
        return largest_batch(points, usable(card, gaps_counted=on_card), "reserved" if on_card else "peak")


def parts_of(points: Sequence[Point]) -> list[str]:
    """The parts that some point has, in the order of the plots."""
    return [name for name in PARTS if any(p.at_peak.get(name) for p in points)]


def points_table(profile: Profile) -> tuple[list[str], Rows]:
    """Every point: peak, and where it was measured reserved memory, speed and MFU."""
    real = profile.device != "simulate"
    peak = {"simulate": "peak GiB", "cuda": "allocated GiB", "cpu": "resident GiB"}[profile.device]
    header = [VARIANT, "batch", peak]
    header += ["reserved GiB"] if profile.device == "cuda" else []
    header += ["images/s", "s a step (min to max)", "MFU"] if real else ["between steps GiB"]
    header += ["GFLOP/image"]
    rows = []
    for p in profile.points:
        row = [p.variant.name(), str(p.batch_size)]
        if not p.ok:
            rows.append([*row, p.status, *[""] * (len(header) - 3)])
            continue
        row.append(f"{p.peak / GIB:.2f}")
        row += [f"{p.reserved / GIB:.2f}"] if profile.device == "cuda" else []
        row += _speed(p) if real else [f"{p.between_steps / GIB:.2f}"]
        rows.append([*row, f"{p.flops_per_image / 1e9:.0f}"])
    return header, rows


def _speed(p: Point) -> list[str]:
    median, least, most = p.step_seconds
    rate = p.images_per_s or 0.0
    mfu = "" if p.mfu is None else f"{p.mfu:.0%}"
    return [f"{rate:.1f}" if rate >= 1 else f"{rate:.3f}", f"{median:.3f} ({least:.3f} to {most:.3f})", mfu]


def fits_table(profile: Profile) -> tuple[list[str], Rows]:
    """Every variant's line, and the largest batch predicted for each card.

    Simulated: the slope at the batch sizes asked for stands beside that of the line which predicts.
    """
    simulated = profile.device == "simulate"
    header = [VARIANT, "fixed GiB", "MiB/image"]
    header += [f"at {profile.sizes[0]} to {profile.sizes[-1]}"] if simulated else []
    header += ["line off by", *(f"{card} GB" for card in CARDS if profile.predicts)]
    rows = []
    for variant, line in profile.fits().items():
        near = profile.near(variant) if simulated else line
        row = [variant.name(), f"{line.fixed / GIB:.2f}", f"{line.slope / MIB:.1f}"]
        row += [f"{near.slope / MIB:.1f}" if near else ""] if simulated else []
        row += [f"{near.deviation:.2%}" if near and near.points > 2 else "2 points"]
        rows.append([*row, *(_batch(profile.largest(variant, card)) for card in CARDS if profile.predicts)])
    return header, rows


def _batch(batch: int | None) -> str:
    return "?" if batch is None else str(batch) if batch else "-"


def predictions_table(profile: Profile) -> tuple[list[str], Rows]:
    """Launches of a step, and the milliseconds that it is predicted to take on each card."""
    shown = [p for p in profile.points if p.ok and p.predicted and p.variant.purpose != "ratios"]
    cards = list(dict.fromkeys(name for p in shown for name in p.predicted))
    header = [VARIANT, "batch", "launches", *cards]
    rows = []
    for p in shown:
        times = [f"{p.predicted[name]['ms']:.1f}" if name in p.predicted else "" for name in cards]
        rows.append([p.variant.name(), str(p.batch_size), str(p.launches), *times])
    return header, rows


def work_table(profile: Profile) -> tuple[list[str], Rows]:
    """Launches, bytes and FLOPs of a step by part, of the points whose peak is broken down."""
    shown = [p for p in breakdown_points(profile) if p.work]
    header = ["launches / GB / TFLOP a step", *(f"{p.variant.name()}, batch {p.batch_size}" for p in shown)]
    names = dict.fromkeys(part for p in shown for part in p.work)
    rows = [[part, *(_work(**p.work[part]) if part in p.work else "" for p in shown)] for part in names]
    return header, [*rows, ["all", *(_work(p.launches, p.bytes, p.flops) for p in shown)]] if shown else []


def _work(launches: float, bytes: float, flops: float) -> str:
    return f"{launches:.0f} / {bytes / GB:.1f} / {flops / 1e12:.1f}"


def breakdown_points(profile: Profile) -> list[Point]:
    """Each variant's point at the largest batch size that was asked for and that all could run; else its largest."""
    points_of = by_variant([p for p in profile.points if p.ok and p.at_peak and p.variant.purpose != "ratios"])
    common = set(profile.sizes).intersection(*({p.batch_size for p in points} for points in points_of.values()))
    size = max(common, default=None)
    return [next((p for p in points if p.batch_size == size), points[-1]) for points in points_of.values()]


def breakdown_table(profile: Profile) -> tuple[list[str], Rows]:
    """MiB at the peak by what they belong to."""
    shown = breakdown_points(profile)
    header = ["MiB at the peak", *(f"{p.variant.name()}, batch {p.batch_size}" for p in shown)]
    rows = [[part, *(f"{p.at_peak.get(part, 0) / MIB:.0f}" for p in shown)] for part in parts_of(shown)]
    return header, [*rows, ["all", *(f"{p.peak / MIB:.0f}" for p in shown)]] if shown else []


def comparison_table(profile: Profile) -> tuple[list[str], Rows]:
    """Slopes, simulated against measured."""
    header = [VARIANT, "simulated MiB/image", "measured MiB/image", "ratio", "within 10 %"]
    rows = [
        [c.variant.name(), f"{c.simulated / MIB:.1f}", f"{c.measured / MIB:.1f}", f"{c.ratio:.3f}", _yes(c.within)]
        for c in profile.comparisons
    ]
    return header, rows


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def notes(profile: Profile) -> list[str]:
    """Notes: points that did not run, with the reason, and the claim."""
    lines = [f"{p.variant.label()}, batch {p.batch_size}: {p.status}: {p.note}" for p in profile.points if not p.ok]
    lines += dict.fromkeys(p.note for p in profile.points if p.ok and p.note)
    if profile.device == "cuda" and (outside := max((p.outside for p in profile.points if p.ok), default=0)):
        lines.append(f"beside the allocator (CUDA context, libraries, other processes): {outside / GIB:.2f} GiB")
    return lines + [str(claim) for claim in profile.claims]


def show(profile: Profile, console: Console) -> None:
    """Tables and notes on the terminal."""
    titles = {
        "Points": points_table(profile),
        "Lines, and the largest batch predicted to fit": fits_table(profile),
        "Predicted ms a step, whether or not the card holds it": predictions_table(profile),
        "Work of a step on a GPU": work_table(profile),
        "What the bytes are": breakdown_table(profile),
        "Simulated against measured": comparison_table(profile),
    }
    for title, (header, rows) in titles.items():
        if rows:
            table = Table(title=title, title_justify="left", title_style="bold")
            for i, name in enumerate(header):
                table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
            for row in rows:
                table.add_row(*row)
            console.print(table)
    for line in notes(profile):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def write_csv(profile: Profile, path: Path) -> None:
    """A line a point; bytes, seconds and images per second, the parts of the peak in columns of their own."""
    parts = parts_of(profile.points)
    fields = ["recipe", "overrides", "purpose", "batch_size", "device", "status", "note", "peak", "reserved", "outside"]
    fields += ["between_steps", "images_per_s", "step_s", "step_s_min", "step_s_max", "mfu", "flops_per_image"]
    cards = list(dict.fromkeys(card for p in profile.points for card in p.predicted))
    fields += ["world_size", "launches", "bytes", "flops"] if cards else []
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*fields, *(f"ms: {card}" for card in cards), *(f"peak: {part}" for part in parts)])
        for p in profile.points:
            seconds = p.step_seconds or [None] * 3
            row = [p.variant.recipe, " ".join(p.variant.overrides), p.variant.purpose, p.batch_size, p.device]
            row += [p.status, p.note, p.peak, p.reserved, p.outside, p.between_steps, p.images_per_s, *seconds, p.mfu]
            row += [p.flops_per_image, *([p.world_size, p.launches, p.bytes, p.flops] if cards else [])]
            row += [p.predicted.get(card, {}).get("ms") for card in cards]
            writer.writerow([*row, *(p.at_peak.get(part, 0) for part in parts)])
