"""Draw learning.svg, the picture of docs/results.md: `python docs/images/learning.py`.

The curves are those of the first record in bench/results/learning: kNN accuracy of the teacher's checkpoints against
images seen and against minutes, median and range over the seeds.
"""

import json
import statistics
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
LOOKS = {  # side -> name, colour, marker
    "published": ("published code", "#b5541c", "s"),
    "ours": ("ours", "#1f6fb2", "o"),
    "longer": ("ours, for as many minutes", "#1f6fb2", "^"),
    "pixels": ("ours, pixel loss alone", "#7a4fa3", "D"),
    "dense": ("ours, without masks", "#3f7d4e", "v"),
}
POOLINGS = {"knn_cls": "cls token", "knn_mean": "mean of patches"}
CLOCKS = {"processor": "minutes of processor time", "wall": "minutes"}


def curve(axes: Axes, record: dict, side: str, horizontal: str, scale: float, probe: str) -> None:
    """Median over the seeds as a line, least and most as a band."""
    name, colour, marker = LOOKS[side]
    start = [run["points"][0][probe] for run in record["runs"] if run["side"] == "random"]
    runs = [run["points"] for run in record["runs"] if run["side"] == side]
    columns = list(zip(*runs, strict=True))
    x = [0.0, *(statistics.median(point[horizontal] for point in column) / scale for column in columns)]
    y = [start, *([point[probe] for point in column] for column in columns)]
    line = "--" if side == "longer" else "-"
    axes.plot(x, [100 * statistics.median(values) for values in y], line, color=colour, marker=marker, ms=4, label=name)
    axes.fill_between(
        x, [100 * min(values) for values in y], [100 * max(values) for values in y], color=colour, alpha=0.12, lw=0
    )


def draw(record: dict) -> Figure:
    """A row for each pooling of the features: against images and against minutes."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasSVG(figure)
    there = [side for side in LOOKS if any(run["side"] == side for run in record["runs"])]
    for (left, right), (probe, name) in zip(figure.subplots(2, 2, sharey="row"), POOLINGS.items(), strict=True):
        for side in there:
            if side != "longer":
                curve(left, record, side, "images", 1000, probe)
            curve(right, record, side, f"{record['clock']}_s", 60, probe)
        left.set_xlabel("thousand images seen")
        right.set_xlabel(CLOCKS[record["clock"]])
        left.set_ylabel(f"kNN accuracy, {name}, %")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
            axes.set_xlim(0)
    right.legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "learning"  # equal records give equal files
    first = sorted((ROOT / "bench" / "results" / "learning").glob("*.json"))[0]
    shown = draw(json.loads(first.read_text(encoding="utf-8")))
    shown.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})
