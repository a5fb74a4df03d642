"""The commands that change the form of weights: `pera-fast export` and `convert`."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    weights: Annotated[
        str,
        typer.Option(
            help="A run, an exported folder, a file (.safetensors, .params, .pt), or a timm model.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the exported model.", show_default=False)],
    formats: Annotated[
        str | None, typer.Option(help="timm, onnx, or both with a comma.", show_default="both; onnx if it is installed")
    ] = None,
    license_: Annotated[
        str | None, typer.Option("--license", help="Licence of the weights, such as cc-by-4.0, for the README.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option("--eval", help="A report.json of `pera-fast eval`, for the README.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads, for a file that does not say.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
) -> None:
    """Export a backbone as a folder that timm, onnxruntime and pera-fast load without further settings."""
    from pera_fast.interop.export import export as run

    wanted = None if formats is None else [name.strip() for name in formats.split(",")]
    typer.echo(run(weights, out, wanted, license_, evaluation, heads, overwrite).summary)


def convert(
    weights: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="The authors' PUBLISHED.params, or a checkpoint of a run.", show_default=False
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the converted weights; FILE.params: write the authors' form.", show_default=False
        ),
    ],
    heads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Attention heads, which no published checkpoint holds.",
            show_default="the run's; else by width: 6 for 384, 12 for 768, 16 for 1024",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
) -> None:
    """Turn a published PerA checkpoint, or one of a run, into safetensors that timm loads by name, or back."""
    from pera_fast.errors import UserError

    if out.suffix == ".params":
        from pera_fast.interop.to_published import convert_back

        if heads is not None:
            raise UserError(f"--heads {heads}: has no effect where the authors' form is written; leave it out")
        typer.echo(convert_back(weights, out, overwrite).summary)
        return
    from pera_fast.interop.published import convert as run

    typer.echo(run(weights, out, heads, overwrite).summary)
