"""`pera-fast eval`: parses arguments and calls the evaluation."""

from pathlib import Path
from typing import Annotated

import typer

from pera_fast.errors import UserError


def evaluate(
    task: Annotated[str, typer.Option(help="scene, segmentation or change.", show_default=False)],
    data: Annotated[
        Path,
        typer.Option(help="CSV of files and labels, or a folder (see docs/how-to/evaluate.md).", show_default=False),
    ],
    weights: Annotated[
        list[str],
        typer.Option(
            help="Run, exported folder, file, timm model, random:RECIPE, or beside others random; may be given several"
            " times.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.html and report.json.", show_default=False)],
    root: Annotated[
        Path | None, typer.Option(help="Folder of the paths in a CSV.", show_default="the CSV's, or that of its name")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Size of images, of masks' images of tiles, in pixels a side.", show_default="by the weights"
        ),
    ] = None,
    labels: Annotated[str, typer.Option(help="Shares of the labels to learn from, such as 0.01,0.1,1.")] = "1",
    pooling: Annotated[str, typer.Option(help="Features of a scene: some of cls,mean,both.")] = "cls,mean,both",
    seed: Annotated[int, typer.Option(min=0, help="Seed of splits, shares, probes and random weights.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda; auto: cuda if there is one.")] = "auto",
    precision: Annotated[
        str | None,
        typer.Option(help="Precision of the network: bf16, fp16 or fp32.", show_default="fp32, on a GPU bf16"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    heads: Annotated[
        int | None,
        typer.Option(min=1, help="Attention heads, for a file that does not say.", show_default="usual ones"),
    ] = None,
    head: Annotated[str, typer.Option(help="Head on patch features, for masks: linear or conv.")] = "linear",
    layers: Annotated[
        int, typer.Option(min=1, help="Blocks whose features the head for masks sees, evenly spread.")
    ] = 4,
    classes: Annotated[
        str | None,
        typer.Option(help="Names of the classes 0, 1, ... of masks: background,road.", show_default="their numbers"),
    ] = None,
    ignore: Annotated[
        int | None, typer.Option(help="Value of masks whose pixels count for nothing.", show_default="none")
    ] = None,
    folds: Annotated[
        int, typer.Option(min=0, help="Folds of a cross-validation over all samples with masks; 0: the given splits.")
    ] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a report that is there.")] = False,
) -> None:
    """Evaluate frozen weights on labelled scenes, masks or changes: a table, an HTML report, a JSON file.

    Several --weights are compared side by side.
    """
    shares = _numbers("--labels", labels)
    from pera_fast.eval.run import evaluate as run

    found = run(
        task, data, weights, out, root=root, size=size, labels=shares, poolings=pooling.split(","), seed=seed,
        device=device, precision=precision, batch_size=batch_size, heads=heads, head=head, layers=layers,
        classes=classes.split(",") if classes else (), ignore=ignore, folds=folds, overwrite=overwrite,
    )  # fmt: skip
    from pera_fast.eval.report import text_table

    typer.echo(text_table(found))
    for note in found.notes:
        typer.echo(note)
    typer.echo(f"report: {found.report}")


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{name} {text}: wants shares above 0 and at most 1, such as 0.01,0.1,1") from None
