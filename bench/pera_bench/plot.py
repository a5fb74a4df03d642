"""Plots a measurement: speed-ups over the reference, shares of the machine's ceilings, sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pera_bench.record import Record
from pera_bench.show import SHORT


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
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.6 * lines), layout="constrained")
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
        axes.set(
            xscale="log", yscale="log", title=f"{suite} {SHORT.get(direction, direction)}", xlabel="images of a step"
        )
        axes.legend(fontsize=6)
    all_axes[0].set_ylabel("images/s")
    return _save(figure, record, path)


def overview(record: Record, path: Path) -> Path:
    """A line for each bench, a mark for each implementation."""
    lines = list(dict.fromkeys(_name(row, record) for row in record.rows))
    figure = Figure(figsize=(11, 1.6 + 0.24 * max(len(lines), 4)), layout="constrained")
    FigureCanvasAgg(figure)
    faster, nearer = figure.subplots(1, 2, sharey=True)
    for name in dict.fromkeys(row["implementation"] for row in record.rows):
        rows = [row for row in record.rows if row["implementation"] == name]
        timed = [row for row in rows if row.get("speedup")]
        faster.scatter([r["speedup"] for r in timed], [lines.index(_name(r, record)) for r in timed], s=18, label=name)
        stated = [row for row in rows if _share(row)]
        nearer.scatter([_share(r) for r in stated], [lines.index(_name(r, record)) for r in stated], s=18, label=name)
    faster.set(xscale="log", xlabel="times as fast as eager PyTorch")
    faster.set_yticks(range(len(lines)), lines, fontsize=7)
    faster.set_ylim(len(lines) - 0.5, -0.5)
    faster.axvline(1, color="0.6", lw=0.8)
    nearer.set(xscale="log", xlabel="share of the nearer ceiling, copy or products")
    nearer.axvline(1, color="0.6", lw=0.8)
    for axes in (faster, nearer):
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
    nearer.legend(fontsize=7, loc="lower left")
    return _save(figure, record, path)


def _save(figure: Figure, record: Record, path: Path) -> Path:
    m = record.machine
    figure.suptitle(f"{m['device']}, torch {m['torch']}, commit {m['commit']}, {m['date']}", fontsize=9)
    figure.savefig(path, dpi=150)
    return path


def _share(row: dict[str, Any]) -> float:
    return max(row.get("of_copy", 0.0), row.get("of_matrix", 0.0))


def _name(row: dict[str, Any], record: Record) -> str:
    """Name of a line, with recipe and images where the record has several."""
    name = f"{row['suite']}/{row['case']} {SHORT.get(row['direction'], row['direction'])}"
    several = len({(r["recipe"], r["images"]) for r in record.rows}) > 1
    return f"{name}, {row['recipe']}, {row['images']}" if several else name
