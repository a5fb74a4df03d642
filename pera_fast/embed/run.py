"""`pera-fast embed`: features of a folder of images, by frozen weights, as Parquet or .npy."""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from pera_fast.config import Config
from pera_fast.config.keys import did_you_mean
from pera_fast.data.bands.misfits import bands_left_out, refused
from pera_fast.data.bands.sensor import misfits
from pera_fast.data.files.manifest import Manifest
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.index.build import index_for
from pera_fast.embed.parts import Parts
from pera_fast.embed.table import About, weights_digest
from pera_fast.embed.writer import Writer
from pera_fast.errors import UserError
from pera_fast.features.extract import POOLINGS, Extractor, choose_device
from pera_fast.paths import local_path, new_file, refuse_inside
from pera_fast.weights.backbone import Backbone
from pera_fast.weights.load import load_backbone

_log = logging.getLogger("pera_fast")
SUFFIXES = (".parquet", ".npy")
_BATCH = {"cpu": 64, "cuda": 256}


@dataclass(frozen=True)
class Embedded:
    """Result of a call.

    Attributes:
        out: the output.
        images: rows in it.
        skipped: files that could not be used.
        rate: images a second of this call, without index and start; 0 if none was left to embed.
        summary: one line.
    """

    out: Path
    images: int
    skipped: int
    rate: float
    summary: str


def embed(
    images: str | os.PathLike[str],
    weights: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    pooling: str = "cls",
    patches: bool = False,
    size: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    precision: str | None = None,
    heads: int | None = None,
    resume: bool | str = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Embedded:
    """Embeds every readable image of a folder, in the order of their paths.

    Args:
        images: folder of images or of shards.
        weights: as of `load_backbone`.
        out: a .parquet file (`table`), or a .npy file: float16 [N, D], with a CSV of paths and places beside it.
        pooling: cls, mean (of the patches), or both, one after the other.
        patches: keep the features of all patches too, [L, D] of an image.
        size: pixels a side that images are resized to; None: that of the backbone's global crops.
        batch_size: images at a time; None: 64, on a GPU 256.
        device: cpu, cuda or auto.
        precision: bf16, fp16 or fp32; None: bf16 on a GPU, else fp32.
        heads: attention heads, for weights that do not say.
        resume: go on with what a stopped call of the same arguments left; "auto": begin where there is nothing.
        overwrite: replace an output, or parts of one.
        progress: show bars, if there is a terminal.

    Raises:
        UserError: wrong arguments, weights or images; the output is there or cannot be written.
        MachineError: the storage did not answer in time. What is embedded so far is kept, as after Ctrl-C.
    """
    target = _target(out, images, overwrite, patches)
    if pooling not in POOLINGS:
        raise UserError(f"--pooling {pooling}: wants one of {', '.join(POOLINGS)}{did_you_mean(pooling, POOLINGS)}")
    on = choose_device(device)
    backbone = load_backbone(weights, heads)
    extractor = Extractor(backbone, on, size, precision, batch_size or _BATCH[on.type])
    about = new_about(Path(os.path.abspath(images)), os.fspath(weights), heads, extractor, pooling, patches)
    cfg = reading(backbone.cfg)
    with Parts(target) as parts:
        if parts.begun and not (resume or overwrite):
            raise UserError(
                f"--out {target}: is begun already ({parts.folder}); go on with --resume, or --overwrite to begin anew"
            )
        if resume is True and not parts.begun:
            raise UserError(f"--out {target}: nothing to resume there; leave --resume out to begin")
        skipped_path = target.with_name(f"{target.stem}.skipped.csv")
        if parts.begun and resume:
            manifest = parts.go_on(about)
        else:
            manifest = _indexed(images, cfg, backbone, progress)
            skipped_path.unlink(missing_ok=True)
            parts.begin(about, manifest)
        skipped = SkippedFiles(skipped_path)
        for path, reason in manifest.unreadable():
            skipped.add(path, reason)
        rate = Writer(cfg, manifest, extractor, about, parts, skipped).run(progress)
        count = parts.finish(about)
    files = manifest.table.num_rows
    told = f", {files - count} of {files} files could not be used ({skipped_path})" if files > count else ""
    speed = f", {rate:.4g} images/s" if rate else ""
    summary = f"{target}: {count} embeddings of {about.width} values ({pooling}, {about.size} px){speed}{told}"
    return Embedded(target, count, files - count, rate, summary)


def reading(cfg: Config) -> Config:
    """Settings by which images are read: those of the weights alone, whatever lies in the folder.

    Vectors of two folders are then comparable, and equal to what evaluations see.
    """
    depth = "8" if cfg.data.depth == "auto" else cfg.data.depth
    return cfg.with_values({"data.depth": depth, "data.index": None, "data.verify": True})


def _target(out: str | os.PathLike[str], images: str | os.PathLike[str], overwrite: bool, patches: bool) -> Path:
    target = local_path("--out", out)
    if target.suffix not in SUFFIXES or not target.stem:
        raise UserError(f"--out {target}: wants a name that ends in {' or '.join(SUFFIXES)}")
    if not target.absolute().parent.is_dir():
        raise UserError(f"--out {target}: there is no folder {target.parent}")
    if target.is_dir():
        raise UserError(f"--out {target}: is a folder; give the name of a file")
    refuse_inside("--out", target, images)
    beside = [target.with_suffix(".csv")] if target.suffix == ".npy" else []
    beside += [target.with_name(f"{target.stem}.patches.npy")] if beside and patches else []
    for path in (target, *beside):
        new_file("--out", path, overwrite)
    return target


def new_about(root: Path, weights: str, heads: int | None, extractor: Extractor, pooling: str, patches: bool) -> About:
    """Facts about the table that these arguments give."""
    backbone = extractor.backbone
    cfg = reading(backbone.cfg)
    return About(
        root=str(root),
        weights=str(Path(weights).absolute()) if Path(weights).exists() else weights,
        heads=heads,
        digest=weights_digest(backbone),
        pooling=pooling,
        width=backbone.width * (2 if pooling == "both" else 1),
        size=extractor.size,
        patch_size=cfg.model.patch_size,
        patches=patches,
        precision=str(extractor.dtype).removeprefix("torch."),
        channels=cfg.model.in_chans,
        bands=cfg.data.bands,
        rgb_bands=cfg.views.rgb_bands,
        depth=cfg.data.depth,
        band_scale=cfg.data.band_scale,
        band_range=cfg.data.band_range,
        mean=list(cfg.views.mean),
        std=list(cfg.views.std),
        batch_size=extractor.batch_size,
    )


def _indexed(images: str | os.PathLike[str], cfg: Config, backbone: Backbone, progress: bool) -> Manifest:
    """The index of the folder. Raises UserError for images of other bands than the weights take."""
    channels = cfg.model.in_chans
    try:
        manifest = index_for(images, cfg, progress=progress)
    except UserError as error:
        stored = re.search(r"has (\d+) band\(s\)", str(error))
        if stored is None:
            raise
        raise UserError(
            f"weights {backbone.source} take {channels} channels, and no image in {images} has them: the first has"
            f" {stored[1]} band(s); give weights of a run on these bands"
        ) from None
    told, manifest = bands_left_out(cfg, manifest), refused(cfg, manifest)
    if not len(manifest.readable):
        raise UserError(
            f"weights {backbone.source} take {channels} channels, and in {images} {told.split(', and ')[0]}; give"
            " weights of a run on these bands"
        )
    for told in misfits(cfg, manifest):
        _log.warning("%s: %s", images, told)
    return manifest
