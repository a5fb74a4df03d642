"""Plots of a profile, as PNG."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from pera_fast.page import png
from pera_fast.profile.fits import CARDS, GB, MemoryFit, by_variant
from pera_fast.profile.points import Variant
from pera_fast.profile.tables import GIB, MIB, Profile, breakdown_points, parts_of

LineStyle = str | tuple[int, tuple[int, int]]  # a name, or (offset, (on, off))
LINES = ("#2e6f95", "#d1495b", "#edae49", "#66a182", "#6a4c93", "#8d5524", "#1b998b", "#c44900", "#3d405b", "#b56576")
CARD = "#9aa5b1"
CLOSE = 1.25  # cards whose labels would lie on each other
# Stays between steps: grays. Made by a step: blues and greens for what the student keeps, reds for what backward makes.
PART_COLOURS = {
    "weights": "#4a5561", "optimiser state": "#8b96a2", "gradients": "#c2cad1", "weight copies": "#dfe4e8",
    "crops": "#edae49", "student embed": "#bfe3d0", "student stream": "#8fcfb2", "student attention": "#2e6f95",
    "student mlp": "#5fa8d3", "student cls head": "#66a182", "student pixel head": "#3c7a5a", "teacher": "#6a4c93",
    "loss": "#f4978e", "backward": "#d1495b", "update": "#8d5524", "other": "#000000",
}  # fmt: skip


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.grid(True, which="major", color="#eef0f3", linewidth=0.8)
    axes.set_axisbelow(True)


def _log_axis(axis: Axis) -> None:
    """Powers of two, written as plain numbers."""
    axis.set_major_locator(LogLocator(base=2, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _colour(variants: Sequence[Variant], variant: Variant) -> str:
    """Colour of a variant that no other has."""
    number, count = list(variants).index(variant), len(variants)
    return LINES[number] if count <= len(LINES) else to_hex(plt.get_cmap("turbo")(0.05 + 0.9 * number / (count - 1)))


def memory(profile: Profile) -> bytes:
    """Peak memory over the batch size, with lines beyond the points and the cards' limits; mask ratios not."""
    points_of = by_variant([p for p in profile.points if p.variant.purpose != "ratios"])
    figure, axes = plt.subplots(figsize=(9.2, 5.6))
    _style(axes)
    fits = profile.fits()
    most = max((p.batch_size for p in profile.points), default=1)
    reach = [profile.largest(v, CARDS[-1]) or 0 for v in fits if v in points_of] if profile.predicts else []
    right = max([2 * most, *reach])
    for variant, points in points_of.items():
        ran = [p for p in points if p.ok]
        colour = _colour(list(points_of), variant)
        axes.plot([p.batch_size for p in ran], [p.peak / GIB for p in ran], "o", color=colour, markersize=5)
        if variant in fits:
            last = max(p.batch_size for p in ran)
            if profile.device == "simulate":  # it bends: see fits.fit_points
                found, at = [p.batch_size for p in ran], _between(ran[0].batch_size, last)
                axes.plot(at, np.interp(at, found, [p.peak / GIB for p in ran]), color=colour, linewidth=1.6)
            else:
                _draw_line(axes, fits[variant], ran[0].batch_size, last, colour, "-")
            _draw_line(axes, fits[variant], last, right, colour, (0, (3, 2)))
            axes.plot([], [], "o-", color=colour, label=variant.label())
        elif ran:
            axes.plot([], [], "o", color=colour, label=variant.label())
        for p in points:
            if p.status == "out of memory":
                axes.plot([p.batch_size], [0.97], "x", color=colour, transform=axes.get_xaxis_transform(), markersize=7)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    _log_axis(axes.xaxis)
    _log_axis(axes.yaxis)
    low = min((p.batch_size for p in profile.points), default=1)
    axes.set_xlim(low / 1.15, right * 1.05)
    if profile.predicts:
        axes.set_ylim(top=CARDS[-1] * GB / GIB * 1.25)
        _draw_cards(axes)
    what = {"simulate": "peak of live tensors", "cuda": "peak allocated", "cpu": "peak resident memory"}[profile.device]
    axes.set_xlabel("batch size (images), log scale", fontsize=10)
    axes.set_ylabel(f"{what}, GiB, log scale", fontsize=10)
    beside = 1.09 if profile.predicts else 1.01  # the cards' names
    axes.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(beside, 0.5))
    return png(figure)


def _draw_line(axes: Axes, line: MemoryFit, low: float, high: float, colour: str, style: LineStyle) -> None:
    x = _between(low, high)
    axes.plot(x, [line.at(b) / GIB for b in x], color=colour, linewidth=1.6, linestyle=style)


def _between(low: float, high: float) -> np.ndarray:
    return np.geomspace(low, max(low, high), 200)


def _draw_cards(axes: Axes) -> None:
    for card in CARDS:
        y = card * GB / GIB
        near = [other for other in CARDS if other != card and max(card, other) < CLOSE * min(card, other)]
        side = "center" if not near else "bottom" if near[0] < card else "top"
        axes.axhline(y, color=CARD, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        text = f"{card} GB"
        axes.annotate(text, (1.005, y), xycoords=axes.get_yaxis_transform(), fontsize=8.5, color="#5b6875", va=side)


def throughput(profile: Profile) -> bytes:
    """Images per second over the batch size, with the least and the most of the timed steps."""
    points_of = by_variant([p for p in profile.points if p.ok and p.images_per_s])
    figure, axes = plt.subplots(figsize=(9.2, 4.6))
    _style(axes)
    for variant, points in points_of.items():
        x = [p.batch_size for p in points]
        y = [p.images_per_s or 0.0 for p in points]
        images = [(p.images_per_s or 0.0) * p.step_seconds[0] for p in points]
        spread = [[n / p.step_seconds[end] for n, p in zip(images, points, strict=True)] for end in (2, 1)]
        errors = np.abs(np.array(spread) - np.array(y))
        colour = _colour(list(by_variant(profile.points)), variant)
        axes.errorbar(x, y, yerr=errors, marker="o", color=colour, capsize=3, linewidth=1.6, label=variant.label())
    axes.set_xlabel("batch size (images)", fontsize=10)
    axes.set_ylabel("images/s, median; bars: slowest and fastest step", fontsize=10)
    axes.set_xticks(sorted({p.batch_size for p in profile.points if p.ok}))
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.legend(fontsize=9, frameon=False, loc="center left",
                bbox_to_anchor=(1.01, 0.5))  # fmt: skip
    return png(figure)


def breakdown(profile: Profile) -> bytes:
    """Bytes at the peak by owner, a stacked bar a variant, all at one batch size where all ran it."""
    chosen = breakdown_points(profile)
    figure, axes = plt.subplots(figsize=(9.2, 0.62 * len(chosen) + 1.9))
    _style(axes)
    axes.grid(False, axis="y")
    left = np.zeros(len(chosen))
    longest = max(sum(p.at_peak.values()) for p in chosen) / GIB
    for part in parts_of(chosen):
        width = np.array([p.at_peak.get(part, 0) / GIB for p in chosen])
        if width.max() >= 0.003 * longest:  # others are thinner than a line
            axes.barh(range(len(chosen)), width, left=left, color=PART_COLOURS[part], label=part, height=0.66)
        left += width
    for y, (p, end) in enumerate(zip(chosen, left, strict=True)):
        axes.text(end + left.max() * 0.008, y, f"{p.peak / GIB:.2f}", va="center", fontsize=9)
    axes.set_yticks(range(len(chosen)), [f"{p.variant.label()}\nbatch {p.batch_size}" for p in chosen], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, left.max() * 1.08)
    axes.set_xlabel("GiB alive at the peak of a step", fontsize=10)
    below = -0.62 / (0.62 * len(chosen) + 0.9)  # under the axis' label, whatever the number of bars
    axes.legend(fontsize=8.5, frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.42, below), borderaxespad=0)
    return png(figure)


def ratios(profile: Profile) -> bytes:
    """Memory and FLOPs of an image over the student's ratio, with a line for each teacher's ratio."""
    figure, panels = plt.subplots(1, 2, figsize=(9.2, 3.9))
    points_of, fits = by_variant([p for p in profile.points if p.ok]), profile.fits()
    recipes = list(dict.fromkeys(v.recipe for v in points_of if v.purpose == "ratios"))
    found: dict[tuple[str, float], list[tuple[float, float, float]]] = {}
    policies = {v.config(1).model.recompute for v in points_of if v.purpose == "ratios"}
    for variant, line in fits.items():
        model = variant.config(1).model
        if variant.recipe in recipes and model.recompute in policies and model.masking != "none":
            row = model.student_ratio, line.slope / MIB, points_of[variant][0].flops_per_image / 1e9
            found.setdefault((variant.recipe, model.teacher_ratio), []).append(row)
    for axes, column, label in zip(panels, (1, 2), ("MiB an image", "GFLOP an image"), strict=True):
        _style(axes)
        for (recipe, teacher), rows in sorted(found.items()):
            rows.sort()
            colour = LINES[sorted(found).index((recipe, teacher)) % len(LINES)]
            name = f"{recipe}, teacher sees {teacher:g}" if len(recipes) > 1 else f"teacher sees {teacher:g}"
            axes.plot([r[0] for r in rows], [r[column] for r in rows], "o-", color=colour, linewidth=1.6, label=name)
        axes.set_xlabel("share of the patches that the student sees", fontsize=10)
        axes.set_ylabel(label, fontsize=10)
        axes.set_ylim(bottom=0)
    panels[0].legend(fontsize=9, frameon=False, loc="lower right")
    figure.tight_layout()
    return png(figure)
