"""`pera-fast data ...`: the commands that look at images before training on them. Parses and calls, nothing else."""

from pathlib import Path
from typing import Annotated

import typer

data_app = typer.Typer(
    help="Look at a folder of images before training on it.", no_args_is_help=True, rich_markup_mode=None
)


@data_app.command()
def index(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of images.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="The Parquet manifest.", show_default="in the user's cache")] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Decode every file fully.")] = True,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one per core")] = None,
    channels: Annotated[int, typer.Option(min=1, help="model.in_chans of the training that it is for.")] = 3,
) -> None:
    """Check every image below DIR and write what was found into a manifest that pretraining reuses."""
    from pera_fast.data.index import build_index

    manifest = build_index(directory, out=out, verify=verify, workers=workers, channels=channels)
    typer.echo(manifest.summary)
