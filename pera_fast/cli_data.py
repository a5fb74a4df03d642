"""`pera-fast data ...`: commands on images before training. Parses arguments and calls functions."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

data_app = typer.Typer(
    help="Look at a folder of images before training on it.", no_args_is_help=True, rich_markup_mode=None
)

_Companions = Annotated[
    bool,
    typer.Option("--companions", help="Take .ovr, .msk, .aux, thumbnails, hidden and trash folders as images."),
]


@data_app.command()
def index(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of images.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="SECTION.KEY=VALUE", help="Settings of the training, such as data.bands=[4,3,2]."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Path of the Parquet manifest.", show_default="in the user's cache")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Decode every file fully.")] = True,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one per core")] = None,
    channels: Annotated[
        int | None, typer.Option(min=1, help="Channels per image, as model.in_chans=N.", show_default="3")
    ] = None,
) -> None:
    """Check every image below DIR and write what was found into a manifest that pretraining reuses."""
    from pera_fast.config import load_config
    from pera_fast.data.bands.sensor import misfits
    from pera_fast.data.index.build import index_for
    from pera_fast.data.index.unreadable import name_unreadable

    short = [] if channels is None else [f"model.in_chans={channels}"]
    cfg = load_config("vit_b16", [*short, *(overrides or [])])
    cfg = cfg.with_values({
        "data.verify": cfg.data.verify and verify,
        "data.index": cfg.data.index if out is None else str(out),
    })  # fmt: skip
    manifest = index_for(directory, cfg, workers=workers)
    for line in (manifest.summary, *name_unreadable(manifest), *misfits(cfg, manifest)):
        typer.echo(line)


class _Encoding(str, Enum):
    jpeg = "jpeg"
    png = "png"


@data_app.command()
def pack(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of images.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the shards.", show_default=False)],
    size_mib: Annotated[int, typer.Option(min=1, help="Largest size of a shard, in MiB.")] = 1024,
    tile: Annotated[int | None, typer.Option(min=16, help="Cut larger images into tiles of N x N.")] = None,
    resize: Annotated[int | None, typer.Option(min=16, help="Shrink the shorter side to N.")] = None,
    reencode: Annotated[
        _Encoding | None, typer.Option(help="Encode every image anew, in this format.", show_default="as they are")
    ] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality of images that are encoded anew.")] = 95,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads.", show_default="one per core")] = None,
    channels: Annotated[int, typer.Option(min=1, help="Channels per image: model.in_chans of the training.")] = 3,
    companions: _Companions = False,
) -> None:
    """Pack every readable image below DIR into tar files that pretraining and WebDataset read. Stopped, it goes on."""
    from pera_fast.data.tools.pack import pack as run
    from pera_fast.data.tools.pack_images import PackSettings

    settings = PackSettings(size_mib, tile, resize, reencode.value if reencode else None, quality, channels)
    typer.echo(run(directory, out, settings, workers=workers, companions=companions))


class _TileFormat(str, Enum):
    tif = "tif"
    jpg = "jpg"
    png = "png"


@data_app.command()
def tile(
    scenes: Annotated[
        Path, typer.Argument(metavar="SCENES", help="Folder of scenes, or one scene.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder for the tiles.", show_default=False)],
    size: Annotated[int, typer.Option(help="Tile size, in pixels a side.")] = 512,
    overlap: Annotated[int, typer.Option(help="Overlap of neighbouring tiles, in pixels.")] = 0,
    nodata_max: Annotated[float, typer.Option(help="Largest fraction of a tile without data.")] = 0.5,
    nodata: Annotated[
        float | None, typer.Option(help="Value of pixels without data.", show_default="what the scene declares")
    ] = None,
    format_: Annotated[_TileFormat, typer.Option("--format", help="File format of the tiles.")] = _TileFormat.tif,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one per core")] = None,
    companions: _Companions = False,
) -> None:
    """Cut large georeferenced scenes into tiles, each with a JSON file that says where it lies. Stopped, it goes on."""
    from pera_fast.data.tools.tile import tile as run
    from pera_fast.data.tools.tile_grid import TileSettings

    settings = TileSettings(size, overlap, nodata_max, format_.value, nodata)
    typer.echo(run(scenes, out, settings, workers=workers, companions=companions))


@data_app.command()
def dedupe(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of images.", show_default=False)],
    threshold: Annotated[
        int, typer.Option(help="Largest number of differing bits, of 64, between hashes of near-duplicates.")
    ] = 5,
    out: Annotated[Path, typer.Option(help="CSV file for the report.")] = Path("duplicates.csv"),
    move: Annotated[
        Path | None, typer.Option(help="Move the duplicates to this folder.", show_default="only report")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an --out file that is no report of an earlier call.")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads.", show_default="one per core")] = None,
    channels: Annotated[int, typer.Option(min=1, help="Channels per image: model.in_chans of the training.")] = 3,
    companions: _Companions = False,
) -> None:
    """Report near-duplicate images. Of a group the one with the most pixels is kept; nothing is ever deleted."""
    from pera_fast.data.tools.dedupe import dedupe as run

    told = run(
        directory, bits=threshold, out=out, move_to=move, workers=workers, channels=channels, overwrite=overwrite,
        companions=companions,
    )  # fmt: skip
    typer.echo(told)


@data_app.command()
def show(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of images.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Settings, such as train.seed=1.")
    ] = None,
    out: Annotated[Path, typer.Option(help="PNG file for the sheet.")] = Path("sheet.png"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an --out file that is there.")] = False,
    sample: Annotated[
        list[int] | None, typer.Option(help="Sample number; may be given several times.", show_default="the first")
    ] = None,
    epoch: Annotated[int, typer.Option(help="Epoch, counted from 0.")] = 0,
    count: Annotated[int, typer.Option(help="Number of samples, without --sample.")] = 6,
    recipe: Annotated[str, typer.Option(help="Recipe of the training, or a YAML file.")] = "vit_b16",
    run: Annotated[
        Path | None, typer.Option(help="Run folder whose settings are used.", show_default="the recipe's own settings")
    ] = None,
) -> None:
    """Draw what the networks see: crops, both colourings, masks; exactly as training draws them."""
    from pera_fast.config import load_config

    load_config(recipe, overrides or [])  # before PyTorch is loaded
    from pera_fast.show.run import show as draw

    typer.echo(
        draw(
            directory,
            out,
            samples=sample or (),
            epoch=epoch,
            count=count,
            recipe=recipe,
            run=run,
            overrides=overrides or [],
            overwrite=overwrite,
        )
    )


@data_app.command()
def stats(
    data: Annotated[
        Path, typer.Argument(metavar="DIR|MANIFEST", help="Folder of images, or its index.parquet.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Settings, such as data.bands=[4,3,2].")
    ] = None,
    sample: Annotated[int, typer.Option(help="Files to read; 0: all.")] = 4096,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of files.")] = 0,
    json: Annotated[Path | None, typer.Option(help="JSON file for all statistics.", show_default=False)] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file for the histograms.", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --json and --plot files.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads.", show_default="one per core")] = None,
) -> None:
    """Mean, deviation and percentiles of each band, and the settings for pretraining that follow."""
    from pera_fast.data.tools import measure
    from pera_fast.paths import new_file, refuse_inside

    if plot is not None:
        refuse_inside("--plot", plot, data)
    for name, path in (("--json", json), ("--plot", plot)):
        if path is not None:
            new_file(name, path, overwrite)
    measured = measure.measure_data(data, sample=sample, seed=seed, overrides=overrides or [], workers=workers)
    measure.show(measured)
    if json is not None:
        measure.write_json(measured, json)
    if plot is not None:
        from pera_fast.data.tools.measure_plot import write_plot

        write_plot(measured, plot)
