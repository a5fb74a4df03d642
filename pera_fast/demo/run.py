"""Runs the demo: images, a short pretraining, evaluations of the random and the pretrained network, a report."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pera_fast.config import Config, read_config
from pera_fast.demo.found import Compared, DemoResult, Images, verdict
from pera_fast.errors import UserError
from pera_fast.eval.run import Evaluation, evaluate
from pera_fast.eval.task import parts_of
from pera_fast.features.samples import Samples, read_samples
from pera_fast.paths import refuse_inside
from pera_fast.train.api import make_model, pretrain
from pera_fast.weights.backbone import random_backbone
from pera_fast.weights.load import load_backbone

MARK = ".pera-fast-demo"  # in folders that the demo may clear
TRAIN_SCENES, TEST_SCENES = 100, 30  # of each class
PAIRS = 60, 20  # pictures of roads, and of changes, to learn from and to test on
PICTURE = 192  # pixels a side of these
MOST = 1500  # scenes to learn from, and to test on
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
    pairs: tuple[int, int] = PAIRS,
    overrides: tuple[str, ...] = (),
) -> DemoResult:
    """Make images, pretrain ``tiny``, evaluate it against random weights, and write ``out/report.html``.

    Args:
        out: folder for everything; an earlier demo's run in it is replaced.
        data: folder of images instead of procedural scenes; one folder a class gives labels for the scenes. A folder
            that holds `scenes.csv` with its images, and perhaps `roads.csv` and `changes.csv`, gives all of it.
        seed: of the scenes and of the run.
        steps: optimiser steps.
        scenes: images of each class to pretrain on and to hold out.
        pairs: procedural pictures of roads, and of changes, to learn from and to test on.
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
    _add_procedural_masks(images, out, seed, pairs)
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
    evaluations = _evaluated(out, cfg, images, seed)
    compared = tuple(_compared(evaluation) for evaluation in evaluations)
    found = DemoResult(out / "report.html", first, last, compared, images.note, time.perf_counter() - began)
    from pera_fast.demo.contents import report_html  # matplotlib: seconds that a failed run need not wait

    found.report.write_text(report_html(cfg, images, before, after, metrics, found, evaluations), encoding="utf-8")
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
        for name in ("run", "train", "eval"):
            shutil.rmtree(out / name, ignore_errors=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror}); give another folder") from None


def _procedural(out: Path, seed: int, count: tuple[int, int]) -> Images:
    from pera_fast.procedural.scenes import CLASSES, write_scenes

    print(f"making {count[0]} + {count[1]} scenes of each of {len(CLASSES)} classes", flush=True)
    folder = out / f"scenes-{seed}-{count[0]}-{count[1]}"
    write_scenes(folder / "train", count[0], seed=seed)
    write_scenes(folder / "test", count[1], seed=seed, first=1_000_000)
    note = f"procedural overhead scenes of {len(CLASSES)} classes"
    return Images(folder / "train", {"scene": read_samples("scene", folder)}, note)


def _given(data: Path, out: Path, seed: int) -> Images:
    """A user's images. Those to pretrain on are linked in a folder of ours, so that the held-out ones are not."""
    tables = {"scene": data / "scenes.csv", "segmentation": data / "roads.csv", "change": data / "changes.csv"}
    samples = {task: read_samples(task, table) for task, table in tables.items() if table.is_file()}
    try:
        scenes = samples.get("scene") or read_samples("scene", data)
        parts = parts_of(scenes, seed)
    except UserError as error:
        return Images(data, samples, f"images of {data}: no labels, so no evaluation of scenes ({error})")
    folder = out / "train"
    for number, ((file,), labels) in enumerate(zip(parts.labelled.images, parts.labelled.labels, strict=True)):
        link = folder / scenes.classes[labels[0]] / f"{number:07d}{file.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.resolve())
    samples["scene"] = _joined(parts.labelled, parts.test)
    note = f"images of {data}: {len(parts.labelled)} to pretrain on, {len(parts.test)} held out"
    return Images(folder, samples, note)


def _joined(train: Samples, test: Samples) -> Samples:
    """Samples of both parts with their splits; where there are many, those drawn of them."""
    train, test = (_some(part) for part in (train, test))
    return replace(
        train,
        images=train.images + test.images,
        labels=train.labels + test.labels,
        splits=("train",) * len(train) + ("test",) * len(test),
    )


def _some(samples: Samples) -> Samples:
    if len(samples) <= MOST:
        return samples
    return samples.take(sorted(np.random.default_rng(0).permutation(len(samples))[:MOST].tolist()))


def _add_procedural_masks(images: Images, out: Path, seed: int, count: tuple[int, int]) -> None:
    """Make roads and changes for the tasks that the images have no masks for."""
    from pera_fast.procedural.labelled import write_changes, write_roads

    for task, name, write in (("segmentation", "roads", write_roads), ("change", "changes", write_changes)):
        if task not in images.samples:
            print(f"making {count[0]} + {count[1]} pictures of {name}", flush=True)
            folder = out / f"{name}-{seed}-{count[0]}-{count[1]}"
            images.samples[task] = read_samples(task, write(folder, *count, seed=seed, size=PICTURE))


def _newest_weights(folder: Path) -> dict[str, Tensor]:
    newest = sorted((folder / "checkpoints").glob("step_*.pt"))[-1]
    return torch.load(newest, weights_only=True)["model"]


def _evaluated(out: Path, cfg: Config, images: Images, seed: int) -> list[Evaluation]:
    """Evaluations of the random and the pretrained network, a report each, with a table on the terminal."""
    from pera_fast.eval.report import text_table

    found = []
    for task in (task for task in ("scene", "segmentation", "change") if task in images.samples):
        random = random_backbone(cfg, "random")
        trained = replace(load_backbone(out / "run"), source="pretrained")
        evaluation = evaluate(task, images.samples[task], [random, trained], out / "eval" / task, seed=seed)
        print(f"{task}\n{text_table(evaluation)}", flush=True)
        found.append(evaluation)
    return found


def _compared(evaluation: Evaluation) -> Compared:
    before, after = (entry.result for entry in evaluation.largest)
    level = before.metrics.get("all_changed_f1")
    if evaluation.task == "scene":
        level = 1 / len(evaluation.samples.classes)
    assert evaluation.report is not None
    values = before.metrics[before.headline], after.metrics[after.headline]
    return Compared(evaluation.task, before.headline, *values, level, evaluation.report)


def _say(found: DemoResult) -> None:
    print(verdict(found))
    for compared in found.compared:
        print(f"report: {compared.report}")
    print(f"report: {found.report} ({found.seconds:.0f} s)", flush=True)
