"""`pera-fast plot`: curves of runs. Parses arguments and calls functions."""

from pathlib import Path
from typing import Annotated

import typer


def plot(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or their metrics.jsonl.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="PNG or HTML file to write.")] = Path("curves.png"),
    keys: Annotated[
        str | None,
        typer.Option(
            help="Keys of metrics.jsonl, such as loss,lr,images_per_s.",
            show_default="loss, lr, grad_norm, speed, data_wait, all probes and scores",
        ),
    ] = None,
    smooth: Annotated[int, typer.Option(help="Steps that are averaged.")] = 1,
    x: Annotated[str, typer.Option("--x", help="Unit of the x axis: step, epoch or hours.")] = "step",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an --out file that is there.")] = False,
) -> None:
    """Draw curves of one or several runs, of pretraining and fine-tuning, to a PNG or an HTML page."""
    from pera_fast.plot.run import plot as run

    plotted = run(runs, out, [keys] if keys else [], smooth, x, overwrite)
    for line in plotted.warnings:
        typer.echo(f"warning: {line}", err=True)
    typer.echo(plotted.summary)
