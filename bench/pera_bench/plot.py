"""Plots a measurement: speed-ups over the reference, shares of the machine's ceilings, sweeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from pera_bench.record import Record
from pera_bench.show import SHORT

MOST_TICKS = 6
STEPS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7))  # ticks of a decade


def _share(row: dict[str, Any]) -> float:
    return max(row.get("of_copy", 0.0), row.get("of_matrix", 0.0))


# What a panel shows, and the value of a row there; 0 or None: has none.
PANELS: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "times as fast as eager PyTorch": lambda row: row.get("speedup"),
    "share of the nearer ceiling, copy or products": _share,
}


def plot(record: Record, folder: Path) -> list[Path]:
    """Writes bench.png, and where there are several numbers of images, sweep.png."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [overview(record, folder / "bench.png")]
    if len({row["images"] for row in record.rows}) > 1:
        drawn.append(sweep(record, folder / "sweep.png"))
    return drawn


def sweep(record: Record, path: Path) -> Path:
    """Images per second against images of a step: a panel for each suite and direction."""
    panels = list(dict.fromkeys((row["suite"], row["direction"]) for row in record.rows))
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(7 * columns, 3.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in all_axes[len(panels) :]:
        axes.set_axis_off()
    for (suite, direction), axes in zip(panels, all_axes, strict=False):
        here = [row for row in record.rows if (row["suite"], row["direction"]) == (suite, direction)]
        for case, recipe, name in dict.fromkeys((r["case"], r["recipe"], r["implementation"]) for r in here):
            rows = [r for r in here if (r["case"], r["recipe"], r["implementation"]) == (case, recipe, name)]
            speeds = [r["images"] / r["median_s"] for r in rows]
            axes.plot([r["images"] for r in rows], speeds, marker="o", ms=3, label=f"{case}, {recipe}, {name}")
        axes.set(title=f"{suite} {SHORT.get(direction, direction)}", xlabel="images of a step", ylabel="images/s")
        _log_axis(axes, "x", [row["images"] for row in here], exactly=True)
        _log_axis(axes, "y", [row["images"] / row["median_s"] for row in here])
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return _save(figure, record, path)


def overview(record: Record, path: Path) -> Path:
    """A line for each bench, a mark for each implementation; a panel for each measure that a row has."""
    lines = list(dict.fromkeys(_name(row, record) for row in record.rows))
    names = list(dict.fromkeys(row["implementation"] for row in record.rows))
    panels = {label: value for label, value in PANELS.items() if any(map(value, record.rows))} or PANELS
    figure = Figure(figsize=(3 + 4 * len(panels), 1.9 + 0.24 * max(len(lines), 4)), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for (label, value), axes in zip(panels.items(), all_axes, strict=True):
        for number, name in enumerate(names):
            rows = [row for row in record.rows if row["implementation"] == name and value(row)]
            places = [lines.index(_name(row, record)) for row in rows]
            axes.scatter([value(row) for row in rows], places, s=18, label=name, color=f"C{number}")
        axes.set(xlabel=label)
        axes.axvline(1, color="0.6", lw=0.8)
        _log_axis(axes, "x", [1.0, *filter(None, map(value, record.rows))])
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
    all_axes[0].set_yticks(range(len(lines)), lines, fontsize=7)
    all_axes[0].set_ylim(len(lines) - 0.5, -0.5)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=min(len(names), 5), frameon=False)
    return _save(figure, record, path)


def _log_axis(axes: Axes, letter: Literal["x", "y"], values: Sequence[float], exactly: bool = False) -> None:
    """A logarithmic axis with few ticks, written as plain numbers, so that no two of them touch.

    Args:
        letter: which axis.
        values: what is shown.
        exactly: put the ticks at the values, where these are few.
    """
    low, high = min(values), max(values)
    margin = (high / low) ** 0.06 if high > low else 1.5
    low, high = low / margin, high * margin
    ticks = sorted(set(values)) if exactly and len(set(values)) <= MOST_TICKS else log_ticks(low, high)
    axis = axes.xaxis if letter == "x" else axes.yaxis
    axes.set(**{f"{letter}scale": "log", f"{letter}lim": (low, high)})
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
    axis.set_minor_locator(NullLocator())


def _plain(value: float) -> str:
    return f"{value:,.12g}" if 1e-4 <= value < 1e6 else f"{value:.0e}"


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers within [low, high], 0 < low < high: the most that are no more than MOST_TICKS."""
    if high < 4 * low:  # as on a plain axis
        return [
            float(tick)
            for tick in MaxNLocator(MOST_TICKS - 1, steps=[1, 2, 5, 10]).tick_values(low, high)
            if low <= tick <= high
        ]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    best: list[float] = []
    for steps in STEPS:
        ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(best) < len(ticks) <= MOST_TICKS:
            best = ticks
    every = -(-len(decades) // MOST_TICKS)
    return best or [10.0**decade for decade in decades[::every]]


def _save(figure: Figure, record: Record, path: Path) -> Path:
    m = record.machine
    figure.suptitle(f"{m['device']}, torch {m['torch']}, commit {m['commit']}, {m['date']}", fontsize=9)
    figure.savefig(path, dpi=150)
    return path


def _name(row: dict[str, Any], record: Record) -> str:
    """Name of a line, with recipe and images where the record has several."""
    name = f"{row['suite']}/{row['case']} {SHORT.get(row['direction'], row['direction'])}"
    several = len({(r["recipe"], r["images"]) for r in record.rows}) > 1
    return f"{name}, {row['recipe']}, {row['images']}" if several else name
