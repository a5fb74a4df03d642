"""Runs the demo: scenes or a folder, a short pretraining, a probe before and after, a report."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pera_fast.config import Config, read_config
from pera_fast.demo.found import DemoResult, Images, Probe, verdict
from pera_fast.errors import UserError
from pera_fast.eval.task import parts_of
from pera_fast.features.dense import features
from pera_fast.features.images import load_images
from pera_fast.features.knn import knn_accuracy
from pera_fast.features.samples import Samples, read_samples
from pera_fast.model.pera import PerA
from pera_fast.model.transformer import VisionTransformer
from pera_fast.paths import refuse_inside
from pera_fast.train.api import make_model, pretrain

MARK = ".pera-fast-demo"  # in folders that the demo may clear
TRAIN_SCENES, TEST_SCENES = 100, 30  # of each class
PROBE_LIMIT = 1500  # images of either side of the probe
STEPS = 260
BATCH = 32
FIRST = 5  # steps whose mean is the loss at the beginning


def run(
    out: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    steps: int = STEPS,
    scenes: tuple[int, int] = (TRAIN_SCENES, TEST_SCENES),
    overrides: tuple[str, ...] = (),
) -> DemoResult:
    """Make images, pretrain ``tiny``, probe, and write ``out/report.html``.

    Args:
        out: folder for everything; an earlier demo's run in it is replaced.
        data: folder of images instead of procedural scenes; one folder a class gives labels for the probe.
        seed: of the scenes and of the run.
        steps: optimiser steps.
        scenes: images of each class to pretrain on and to hold out.
        overrides: further settings of the run, ``section.key=value``.

    Returns:
        The numbers and where the report is.

    Raises:
        UserError: out holds something else, or what pretraining raises.
    """
    began, out = time.perf_counter(), Path(out)
    if data is not None:
        refuse_inside("--out", out, data)
    _claim(out)
    images = _procedural(out, seed, scenes) if data is None else _given(Path(data), out, seed)
    settings = [f"train.steps={steps}", f"train.seed={seed}", f"train.checkpoint_every={steps}"]
    settings += [f"train.batch_size={BATCH}", *overrides]
    result = pretrain(images.folder, out / "run", "tiny", overrides=settings)
    if result.exit_code:
        raise SystemExit(result.exit_code)
    cfg = read_config(out / "run" / "config.yaml")  # with what the images decided
    before, after = make_model(cfg), make_model(cfg)
    after.load_state_dict(_newest_weights(out / "run"))
    metrics = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    totals = [m["loss"] for m in metrics]
    first, last = float(np.mean(totals[:FIRST])), float(np.mean(totals[-max(len(totals) // 10, 1) :]))
    probe = _probe(cfg, images, before, after)
    found = DemoResult(out / "report.html", first, last, probe, time.perf_counter() - began)
    from pera_fast.demo.contents import report_html  # matplotlib: seconds that a failed run need not wait

    found.report.write_text(report_html(cfg, images, before, after, metrics, found), encoding="utf-8")
    _say(found)
    return found


def _claim(out: Path) -> None:
    """Make the folder ours, and clear what an earlier demo left that would be in the way."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).exists():
        raise UserError(f"--out {out}: is not empty and not an earlier demo's; give another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MARK).touch()
        for name in ("run", "train"):
            shutil.rmtree(out / name, ignore_errors=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror}); give another folder") from None


def _procedural(out: Path, seed: int, count: tuple[int, int]) -> Images:
    from pera_fast.procedural.scenes import CLASSES, write_scenes

    print(f"making {count[0]} + {count[1]} scenes of each of {len(CLASSES)} classes", flush=True)
    folder = out / f"scenes-{seed}-{count[0]}-{count[1]}"
    write_scenes(folder / "train", count[0], seed=seed)
    write_scenes(folder / "test", count[1], seed=seed, first=1_000_000)
    samples = read_samples("scene", folder)
    train, test = samples.need("train"), samples.need("test")
    return Images(folder / "train", train, test, f"procedural overhead scenes of {len(CLASSES)} classes")


def _given(data: Path, out: Path, seed: int) -> Images:
    """A user's folder; with class folders, a fifth of each class is held out of the pretraining."""
    try:
        parts = parts_of(read_samples("scene", data), seed)
    except UserError as error:
        return Images(data, None, None, f"images of {data}: no labels, so no kNN ({error})")
    train, test = parts.labelled, parts.test
    folder = out / "train"  # links, so that the held-out images are not among those pretrained on
    for number, ((file,), labels) in enumerate(zip(train.images, train.labels, strict=True)):
        link = folder / train.classes[labels[0]] / f"{number:07d}{file.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.resolve())
    return Images(folder, train, test, f"images of {data}: {len(train)} to pretrain on, {len(test)} held out")


def _newest_weights(folder: Path) -> dict[str, Tensor]:
    newest = sorted((folder / "checkpoints").glob("step_*.pt"))[-1]
    return torch.load(newest, weights_only=True)["model"]


def _probe(cfg: Config, images: Images, before: PerA, after: PerA) -> Probe:
    """kNN on the teacher's features: mean of cls and of patches, whole images at the global crops' size."""
    if images.train is None or images.test is None:
        return Probe(None, None, 0.0, images.note)
    train, test = (_loaded(cfg, part) for part in (images.train, images.test))
    accuracy = []
    for model in (before, after):
        rows = [_descriptor(cfg, model.teacher.backbone, pictures) for pictures, _ in (train, test)]
        accuracy.append(knn_accuracy(rows[0], train[1], rows[1], test[1]))
    held_out, known = (_share(len(got[1]), part) for got, part in ((test, images.test), (train, images.train)))
    note = (
        f"{held_out} held-out images against {known} pretrained on, k = 20, cosine, {len(images.train.classes)} classes"
    )
    return Probe(accuracy[0], accuracy[1], 1 / len(images.train.classes), note)


def _share(used: int, samples: Samples) -> str:
    """Number of the files that were used, in words."""
    return str(used) if used == len(samples) else f"{used} (drawn at random) of the {len(samples)}"


def _loaded(cfg: Config, samples: Samples) -> tuple[Tensor, Tensor]:
    rows = np.random.default_rng(0).permutation(len(samples))[:PROBE_LIMIT]
    pictures = load_images([samples.images[i][0] for i in rows], cfg.views.global_size, cfg)
    return pictures, torch.tensor([samples.labels[i][0] for i in rows])


def _descriptor(cfg: Config, backbone: VisionTransformer, pictures: Tensor) -> Tensor:
    return features(backbone, pictures, cfg.views.mean, cfg.views.std)[0]


def _say(found: DemoResult) -> None:
    print(verdict(found))
    print(f"report: {found.report} ({found.seconds:.0f} s)", flush=True)
