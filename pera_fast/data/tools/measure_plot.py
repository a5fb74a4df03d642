"""A picture of the bands' histograms."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from pera_fast.data.tools.measure import BINS, Measured
from pera_fast.errors import UserError

ROWS = 24  # of the legend, before it takes another column
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))  # neighbours in colour differ in these


def write_plot(measured: Measured, path: Path) -> None:
    """Draw the histograms, a line for each band. Raises UserError if the picture cannot be written."""
    labels = measured.labels()
    figure, axes = plt.subplots(figsize=(9.5, 4.5))
    for color, dashes, band, label in zip(*_styles(measured), measured.stored, labels, strict=True):
        counts, edges = band.histogram(BINS)
        density = counts / counts.sum() / np.diff(edges)
        axes.stairs(density, edges, label=f"band {label}", color=color, linestyle=dashes, linewidth=1.2)
    axes.set_xlabel("stored value")
    axes.set_ylabel("density")
    axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(  # beside the curves
        frameon=False, fontsize=9, ncols=-(-len(labels) // ROWS), loc="center left", bbox_to_anchor=(1.01, 0.5)
    )
    try:
        figure.savefig(path, dpi=110, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: cannot be written ({error})") from error
    finally:
        plt.close(figure)


def _styles(measured: Measured) -> tuple[list, list]:
    """(colour, dashes) of each band, no two bands alike."""
    count = len(measured.stored)
    if count == 3 and not measured.cfg.data.bands:
        return ["tab:red", "tab:green", "tab:blue"], ["-"] * 3
    colors = list(plt.get_cmap("turbo")(np.linspace(0.05, 0.95, count)))
    return colors, ["-"] * count if count <= 6 else [DASHES[n % len(DASHES)] for n in range(count)]
