"""Draws curves of runs: a panel for each key, a colour for each run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from pera_fast.page import png
from pera_fast.plot.runs import Curve, RunCurves, X

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Style = Literal["-", "--", ":"]
COLOURS = ("#2e6f95", "#d1495b", "#e09f1f", "#4f9d69", "#6a4c93", "#8d5524", "#1b998b", "#c44900", "#3d405b", "#b56576")
STYLES: tuple[Style, ...] = ("-", "--", ":")  # once the colours are used up
X_LABELS: dict[X, str] = {"step": "step", "epoch": "epoch", "hours": "hours of training"}
MEANINGS = {
    "images_per_s": "images per second", "data_wait": "share of the time spent waiting for data", "mem": "MiB",
    "mfu": "share of the GPU's peak FLOP/s", "seconds": "time of a step, s", "lr": "learning rate",
    "wd": "weight decay", "momentum": "of the teacher's EMA", "grad_norm": "before clipping",
    "probe_knn": "kNN accuracy of the teacher", "teacher_temp": "temperature of the teacher's logits",
}  # fmt: skip
COLUMN_INCHES, ROW_INCHES = 5.75, 3.1  # two columns are about 1280 pixels wide
FEW = 60  # points, up to which each is marked


def sheet(runs: Sequence[RunCurves], keys: Sequence[str], unit: X) -> bytes:
    """All panels in one PNG, two in a row."""
    columns = min(2, len(keys))
    rows = -(-len(keys) // columns)
    width = COLUMN_INCHES * columns if columns > 1 else 1.6 * COLUMN_INCHES
    height = ROW_INCHES * rows if columns > 1 else 1.5 * ROW_INCHES
    figure, grid = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    reach = _reach(runs, keys)
    for axes, key in zip(grid.flat, keys, strict=False):
        _panel(axes, runs, key, reach)
        axes.set_title(key, fontsize=11, loc="left", fontweight="bold", color="#1c2733")
    for axes in list(grid.flat)[len(keys) :]:
        axes.remove()
    for column in range(columns):
        _last_of(grid, column, len(keys)).set_xlabel(X_LABELS[unit], fontsize=10)
    figure.tight_layout(h_pad=1.6, w_pad=1.6)
    _legend(figure, runs)
    return png(figure)


def panels(runs: Sequence[RunCurves], keys: Sequence[str], unit: X) -> dict[str, bytes]:
    """A PNG for each key, without a title."""
    reach = _reach(runs, keys)
    return {key: _alone(runs, key, unit, reach) for key in keys}


def _alone(runs: Sequence[RunCurves], key: str, unit: X, reach: tuple[float, float]) -> bytes:
    figure, axes = plt.subplots(figsize=(9.9, 3.8))
    _panel(axes, runs, key, reach)
    axes.set_xlabel(X_LABELS[unit], fontsize=10)
    figure.tight_layout()
    _legend(figure, runs)
    return png(figure)


def _last_of(grid: object, column: int, count: int) -> Axes:
    """The lowest panel of a column."""
    columns = grid.shape[1]  # type: ignore[attr-defined]
    row = (count - 1 - column) // columns
    return grid[row, column]  # type: ignore[index]


def _reach(runs: Sequence[RunCurves], keys: Sequence[str]) -> tuple[float, float]:
    """Limits of x, the same in all panels, so that they can be compared."""
    ends = [run.curves[key].points[0, end] for run in runs for key in keys if key in run.curves for end in (0, -1)]
    margin = 0.02 * (max(ends) - min(ends)) or 0.5
    return min(ends) - margin, max(ends) + margin


def _panel(axes: Axes, runs: Sequence[RunCurves], key: str, reach: tuple[float, float]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.grid(True, color="#eef0f3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlim(reach)
    if key in MEANINGS:
        axes.set_title(MEANINGS[key], fontsize=9, loc="right", color="#5b6875")
    for number, run in enumerate(runs):
        if key in run.curves:
            _curve(axes, run.curves[key], *_look(number))
    axes.ticklabel_format(axis="x", style="plain", useOffset=False)


def _curve(axes: Axes, curve: Curve, colour: str, style: Style) -> None:
    x, mean, least, most = curve.points
    if curve.sparse or len(x) == 1:
        axes.plot(x, mean, marker="o", markersize=4.5 if len(x) <= FEW else 2, color=colour, linestyle=style, lw=1.4)
        return
    faint = curve.smooth is not None
    if (most > least).any():
        axes.fill_between(x, least, most, color=colour, alpha=0.12 if faint else 0.2, linewidth=0)
    axes.plot(x, mean, color=colour, linestyle=style, lw=0.8 if faint else 1.3, alpha=0.3 if faint else 1)
    if curve.smooth is not None:
        axes.plot(*curve.smooth, color=colour, linestyle=style, lw=1.8)


def _look(number: int) -> tuple[str, Style]:
    return COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]


def _legend(figure: Figure, runs: Sequence[RunCurves]) -> None:
    """Names of the runs above the panels."""
    looks = [_look(number) for number in range(len(runs))]
    lines = [Line2D([], [], color=colour, linestyle=style, linewidth=2.2) for colour, style in looks]
    columns = max(1, min(len(runs), 110 // (8 + max(len(run.name) for run in runs))))
    names = [run.name for run in runs]
    figure.legend(lines, names, loc="lower left", bbox_to_anchor=(0.01, 1.0), ncols=columns, frameon=False, fontsize=10)
