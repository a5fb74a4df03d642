"""Commands `finetune` and `predict` of the command line."""

from pathlib import Path
from typing import Annotated

import typer


def finetune(
    task: Annotated[str, typer.Option(help="scene, segmentation or change.", show_default=False)],
    data: Annotated[
        Path,
        typer.Option(
            help="Labelled images: a CSV with columns file,class,split, image,mask,split or before,after,mask,split;"
            " or a folder: one a class, images and masks, or before, after and masks.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Run folder: log, metrics, checkpoints, the best network.", show_default=False)
    ],
    weights: Annotated[
        str | None,
        typer.Option(
            help="A run, an exported folder, a file (.safetensors, .params, .pt, .pth), a timm model's name,"
            " random:RECIPE or random:RUN.",
            show_default="resuming: the run's",
        ),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(help="Folder of the paths in a CSV.", show_default="the CSV's, or the folder of its name"),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="finetune, authors, or a YAML file.", show_default="finetune; resuming: the run's"),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Names of the masks' classes 0, 1, ...", show_default="their numbers"),
    ] = None,
    ignore: Annotated[
        int | None, typer.Option(help="Value of mask pixels that count for nothing.", show_default="none")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="[auto]",
            help="Resume from the newest checkpoint in --out; auto: start where --out holds no run.",
            show_default="off",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="SECTION.KEY=VALUE", help="Settings, such as train.epochs=20 finetune.size=256."),
    ] = None,
) -> None:
    """Fine-tune weights on labelled images: backbone and head, the best network by the validation part.

    Sizes, bands, ranges, mean and std are those of the weights. Settings: `pera-fast config --recipe finetune`.

    Exit status: 0 done; 2 wrong usage, settings or data; interrupted, with a checkpoint: 130 SIGINT, 143 SIGTERM, 138
    SIGUSR1, 129 SIGHUP.
    """
    from pera_fast.config.finetune import check_finetune

    given = list(overrides or [])
    given += [] if ignore is None else [f"finetune.ignore={ignore}"]
    given += [] if classes is None else [f"finetune.classes=[{classes}]"]
    check_finetune(recipe, given)  # before PyTorch is loaded
    from pera_fast.finetune.api import finetune as run

    how = "auto" if resume == "auto" else resume is not None
    result = run(task, data, out, weights, root=root, recipe=recipe, resume=how, overrides=given)
    raise typer.Exit(result.exit_code)


def predict(
    weights: Annotated[
        str, typer.Option(help="A run of `pera-fast finetune`, or its model.safetensors.", show_default=False)
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="An image, a folder, or a CSV with a column file or image; for changes a folder with before and"
            " after, or a CSV with these columns.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the predictions.", show_default=False)],
    root: Annotated[
        Path | None,
        typer.Option(help="Folder of the paths in a CSV.", show_default="the CSV's, or the folder of its name"),
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Pixels a side of the network's input.", show_default="as in training")
    ] = None,
    overlap: Annotated[float, typer.Option(help="Fraction of a tile that neighbours share, for masks.")] = 0.25,
    batch_size: Annotated[int, typer.Option(min=1, help="Images or tiles at a time.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32.", show_default="fp32, on a GPU bf16")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="[auto]",
            help="Go on in a folder that holds predictions, without what is done; auto: the same, or begin.",
            show_default="off",
        ),
    ] = None,
) -> None:
    """Run a fine-tuned network on new images: classes to a CSV, masks to GeoTIFF with the image's place, or PNG.

    Exit status: 0 done; 2 wrong usage or data, or no image could be read; 130 SIGINT, 143 SIGTERM.
    """
    from pera_fast.finetune.predict import predict as run

    run(
        weights, data, out, root=root, size=size, overlap=overlap, batch_size=batch_size, device=device,
        precision=precision, resume=resume is not None,
    )  # fmt: skip
