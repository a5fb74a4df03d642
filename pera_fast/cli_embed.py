"""`pera-fast embed` and `pera-fast similar`: parse arguments and call functions."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

_Device = Annotated[str, typer.Option(help="cpu or cuda; auto: cuda if there is one.")]


def embed(
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="Folder of images or shards.", show_default=False)],
    weights: Annotated[
        str,
        typer.Option(help="Run, exported folder, file, timm model, or random:RECIPE.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="File for the embeddings: OUT.parquet or OUT.npy.", show_default=False)],
    pooling: Annotated[str, typer.Option(help="Vector of an image: cls, mean (of the patches) or both.")] = "cls",
    patches: Annotated[bool, typer.Option("--patches", help="Keep the features of all patches too.")] = False,
    size: Annotated[
        int | None, typer.Option(min=1, help="Image size, in pixels a side.", show_default="the global crops'")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images at a time.", show_default="64, on a GPU 256")
    ] = None,
    device: _Device = "auto",
    precision: Annotated[
        str | None,
        typer.Option(help="Precision of the network: bf16, fp16 or fp32.", show_default="fp32, on a GPU bf16"),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(min=1, help="Attention heads, for weights that do not say.", show_default="usual ones"),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="[auto]",
            help="Go on with what a stopped call left; auto: begin where there is nothing.",
            show_default="off",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output, or parts of one.")] = False,
) -> None:
    """Embed a folder of images with frozen weights: path, place and vector of each, as Parquet or .npy.

    Exit status: 0 done; 2 wrong usage or data; 130 stopped by Ctrl-C, to be resumed.
    """
    from pera_fast.embed.run import embed as run

    done = run(
        images, weights, out, pooling=pooling, patches=patches, size=size, batch_size=batch_size, device=device,
        precision=precision, heads=heads, resume="auto" if resume == "auto" else resume is not None,
        overwrite=overwrite,
    )  # fmt: skip
    typer.echo(done.summary)


def similar(
    query: Annotated[
        str, typer.Argument(metavar="QUERY", help="Image, folder of images, or point LON,LAT.", show_default=False)
    ],
    embeddings: Annotated[Path, typer.Option(help="Parquet file that embed wrote.", show_default=False)],
    out: Annotated[Path, typer.Option(help="PNG or HTML file for the contact sheet.", show_default=False)],
    k: Annotated[int, typer.Option("-k", help="Number of images to find.")] = 20,
    weights: Annotated[
        str | None,
        typer.Option(help="Weights of the embeddings, for a query outside.", show_default="where they were"),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the embedded images.", show_default="where it was")
    ] = None,
    device: _Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an --out file that is there.")] = False,
) -> None:
    """Find the images most alike an image, a folder or a point, and draw them as a contact sheet."""
    from pera_fast.embed.similar import similar as run

    found = run(
        query.strip(), embeddings, out, k=k, weights=weights, images=images, device=device, overwrite=overwrite
    )  # fmt: skip
    for each in found:
        place = "" if each.lon is None else f"  {each.lon:.5f},{each.lat:.5f}"
        typer.echo(f"{each.score:.4f}  {each.path}{place}")
    typer.echo(f"contact sheet: {out}")


def points_as_arguments(args: Sequence[str]) -> list[str]:
    """Put a blank before points of the western hemisphere, which the parser would take for options."""
    return [f" {arg}" if re.fullmatch(r"-\d+(\.\d*)?,\s*[+-]?\d+(\.\d*)?", arg) else arg for arg in args]
