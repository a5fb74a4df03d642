"""`pera-fast data show`: chooses samples of a data set or a run, and draws their sheet."""

import os
from collections.abc import Sequence
from pathlib import Path

from pera_fast.config import Config, load_config, read_config
from pera_fast.data.bands.sensor import adopt
from pera_fast.data.files.manifest import Manifest
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.index.build import open_or_build
from pera_fast.data.sampling.order import SampleOrder
from pera_fast.errors import UserError
from pera_fast.paths import new_file, refuse_inside
from pera_fast.show.sheet import draw_sheet
from pera_fast.train.redraw import redraw
from pera_fast.train.run_folder import RunFolder

MAX_SAMPLES = 64


def show(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    samples: Sequence[int] = (),
    epoch: int = 0,
    count: int = 6,
    recipe: str = "vit_b16",
    run: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
) -> str:
    """Draws the sheet.

    Args:
        root: the data folder.
        out: the PNG file.
        samples: numbers of samples; none: the first ones of the epoch.
        epoch: counted from 0.
        count: how many, where `samples` names none.
        recipe: of the training that it is for, with `overrides`.
        run: a run's folder; its own configuration and index are used instead of `recipe`.
        overrides: settings, such as train.seed=1.
        overwrite: replace a file that is there.

    Returns:
        One line that says what was drawn.

    Raises:
        UserError: no such sample or run, or the file is there already or cannot be written.
    """
    target = new_file("--out", out, overwrite)
    refuse_inside("--out", out, root)
    if target.suffix.lower() != ".png" or not target.absolute().parent.is_dir():
        raise UserError(f"--out {target}: give the name of a .png file in a folder that exists")
    if epoch < 0:
        raise UserError(f"--epoch {epoch}: epochs are counted from 0")
    if run is not None:
        cfg, manifest = _of_run(Path(run), Path(root), overrides)
    else:
        cfg = load_config(recipe, overrides)
        manifest = open_or_build(root, cfg)
        cfg = adopt(cfg, manifest)
    chosen = _choose(cfg, len(manifest.readable), samples, epoch, count)
    drawn = redraw(cfg, manifest, epoch, chosen, SkippedFiles(os.devnull))
    picture = draw_sheet(cfg, manifest, epoch, chosen, drawn)
    try:
        picture.save(target)
    except OSError as error:
        raise UserError(f"--out {target}: cannot be written ({error.strerror or error})") from error
    return f"{target}: {len(chosen)} sample(s) of epoch {epoch}, {picture.width} x {picture.height} pixels"


def _of_run(run: Path, root: Path, overrides: Sequence[str]) -> tuple[Config, Manifest]:
    """Configuration and files of a run, the files now below `root`."""
    folder = RunFolder(run)
    if overrides:
        raise UserError(f"{overrides[0]}: --run takes the run's own settings; leave one of the two out")
    if not folder.config.is_file() or not folder.index.is_file():
        raise UserError(f"--run {run}: holds no run (config.yaml and index.parquet)")
    if not root.is_dir():
        raise UserError(f"data folder {root} does not exist")
    manifest = Manifest.load(folder.index)
    manifest.root = root.absolute()
    cfg = read_config(folder.config)
    return adopt(cfg, manifest), manifest


def _choose(cfg: Config, files: int, samples: Sequence[int], epoch: int, count: int) -> list[int]:
    if not files:
        raise UserError("no readable image to show")
    if len(samples) > MAX_SAMPLES or not 1 <= count <= MAX_SAMPLES:
        raise UserError(f"a sheet shows 1 to {MAX_SAMPLES} samples")
    for sample in samples:
        if not 0 <= sample < files:
            raise UserError(f"--sample {sample}: there are {files} samples, 0 to {files - 1}")
    if samples:
        return list(samples)
    order = SampleOrder(files, seed=cfg.train.seed, batch_size=min(count, files))
    return order(epoch * order.micro_steps_per_epoch)[1].tolist()
