"""Text and pictures of the demo's report."""

import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pera_fast import __version__
from pera_fast.config import Config
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.index.build import load_index
from pera_fast.data.loading.loader import Loader
from pera_fast.demo import figures
from pera_fast.demo.found import METRICS, SUBJECTS, DemoResult, Images, verdict
from pera_fast.eval.run import Evaluation
from pera_fast.features.dense import features
from pera_fast.features.images import is_image, load_images
from pera_fast.model.inputs import StepInputs
from pera_fast.model.pera import PerA
from pera_fast.page import Section, render
from pera_fast.train.inputs import make_inputs


def _first_batch(cfg: Config, folder: Path) -> StepInputs:
    """The run's own first micro-batch, drawn again from its keys."""
    with Loader(
        cfg,
        load_index(folder / "index.parquet"),
        batch_size=cfg.train.resolve_batch(1).per_device,
        device=torch.device("cpu"),
        skipped=SkippedFiles(folder / "redrawn-skipped.csv"),
        transform=lambda batch: make_inputs(batch, cfg),
    ) as loader:
        return next(loader)


def _masks(cfg: Config, trained: PerA, found: DemoResult) -> Section:
    colors = {
        "student sees": figures.STUDENT,
        "student predicts": figures.PREDICTED,
        "teacher sees": figures.TEACHER,
    }
    key = "".join(f'<span class="key" style="background:{c}"></span>{name} &nbsp; ' for name, c in colors.items())
    return Section(
        "Pairs and their disjoint masks",
        "Student and teacher look at the same place, coloured differently, through masks that share no patch. What one"
        " knows the other has to infer.",
        figures.pairs(trained, _first_batch(cfg, found.report.parent / "run"), images=4),
        f"{key}<br>The first images of the run, drawn again from its keys. Patches outlined in yellow are mask tokens"
        " to the student: “student predicts” shows the pixels that the pretrained student gives for them, beside the"
        " patches that it saw. Gray patches cost neither network anything.",
    )


def _losses(metrics: list[dict[str, Any]], found: DemoResult) -> Section:
    return Section(
        "Loss",
        f"Mean total of the first five steps {found.first_loss:.3f}, of the last tenth {found.last_loss:.3f}.",
        figures.losses(metrics),
        "Each part on its own scale; the dark line is a running mean. The distillation parts are cross entropies"
        " against a target that moves. They dip while the center still is zero and every view points at the same few"
        " prototypes, rise as the center spreads the targets, and fall again as the student learns to follow.",
    )


def _tasks(found: DemoResult) -> Section:
    title = "Frozen features, random against pretrained"
    if not found.compared:
        return Section(title, f"Skipped: {found.note}.")
    return Section(
        title,
        "A linear head on features of the frozen network: " + "; ".join(map(str, found.compared)) + ".",
        figures.task_bars(found.compared),
        "Scenes: logistic regression on whole images. Roads and changes: a 1 x 1 convolution on patch features."
        " Training saw no label. Each task has a report of its own beside this one, under eval.",
    )


def _evaluations(evaluations: list[Evaluation]) -> list[Section]:
    """Pictures of the pretrained network's answers, from the tasks' own reports."""
    return [
        replace(section, title=f"{SUBJECTS[evaluation.task].capitalize()}: {section.title}")
        for evaluation in evaluations
        for section in evaluation.largest[-1].result.sections
        if section.png is not None
    ]


def _maps(cfg: Config, images: Images, before: PerA, after: PerA) -> Section:
    pictures = load_images(_some_files(images), 2 * cfg.views.global_size, cfg)
    maps = [features(m.teacher.backbone, pictures, cfg.views.mean, cfg.views.std)[1] for m in (before, after)]
    return Section(
        "PCA maps of patch features",
        "Three principal components of each image's patch features, by the teacher, as red, green and blue.",
        figures.pca_maps(pictures, *maps),
        "Within an image, patches of like colour have like features. Each map is fitted to its image alone, so colours"
        " of different images are not comparable.",
    )


def report_html(
    cfg: Config,
    images: Images,
    before: PerA,
    after: PerA,
    metrics: list[dict[str, Any]],
    found: DemoResult,
    evaluations: list[Evaluation],
) -> str:
    """The report: masks, losses, the tasks, maps of features, and pictures of the tasks' answers."""
    sections = [_masks(cfg, after, found), _losses(metrics, found), _tasks(found), _maps(cfg, images, before, after)]
    sections += _evaluations(evaluations)
    return render(
        "pera-fast demo",
        _lead(images, found, len(metrics)),
        _cards(metrics, found),
        sections,
        _table(cfg, metrics, found),
    )


def _some_files(images: Images, count: int = 8) -> list[Path]:
    if "scene" in images.samples:
        test = images.samples["scene"].part("test")
        files = [paths[0] for paths in test.images]
        per_class = [
            [file for file, labels in zip(files, test.labels, strict=True) if label in labels] for label in range(count)
        ]
        chosen = [members[0] for members in per_class if members]
        return [*chosen, *(file for file in files if file not in chosen)][:count]
    return sorted(p for p in images.folder.rglob("*") if is_image(p, images.folder))[:count]


def _lead(images: Images, found: DemoResult, steps: int) -> str:
    return f"{steps} steps of the recipe tiny on {images.note}. {verdict(found)}"


def _rate(metrics: list[dict[str, Any]]) -> float:
    return float(np.median([m["images_per_s"] for m in metrics]))


def _cards(metrics: list[dict[str, Any]], found: DemoResult) -> dict[str, str]:
    cards = {"loss, first steps to last": f"{found.first_loss:.2f} → {found.last_loss:.2f}"}
    for one in found.compared:
        cards[f"{METRICS.get(one.metric, one.metric)}, {SUBJECTS[one.task]}"] = f"{one.before:.1%} → {one.after:.1%}"
    cards["images per second, median"] = f"{_rate(metrics):.1f}"
    cards["whole demo"] = f"{found.seconds:.0f} s"
    return cards


def _table(cfg: Config, metrics: list[dict[str, Any]], found: DemoResult) -> dict[str, str]:
    plan, views = cfg.train.resolve_batch(1), cfg.views
    waits = float(np.mean([m["data_wait"] for m in metrics]))
    grids = [(cfg.views.global_size // cfg.model.patch_size) ** 2, (cfg.views.local_size // cfg.model.patch_size) ** 2]
    student, predicted, teacher = cfg.model.patch_counts(grids[0])
    return {
        "steps": str(len(metrics)),
        "batch": str(plan),
        "network": f"width {cfg.model.embed_dim}, depth {cfg.model.depth}, {cfg.model.prototypes} prototypes",
        "crops": f"{views.num_global} of {views.global_size} px, {views.num_local} of {views.local_size} px",
        "patches of a global crop": f"{grids[0]}: {student} student, {predicted} predicted, {teacher} teacher",
        "precision": cfg.train.precision,
        "images per second, median": f"{_rate(metrics):.1f}",
        "data wait, mean": f"{waits:.1%} of the step",
        "memory": f"{max(m['mem'] for m in metrics):.0f} MiB",
        "loss, first five steps and last tenth": f"{found.first_loss:.4f}, {found.last_loss:.4f}",
        **{
            f"{one.task}, {METRICS.get(one.metric, one.metric)}": f"{one.before:.4f} random, {one.after:.4f} pretrained"
            + ("" if one.level is None else f", {one.level:.4f} without looking")
            for one in found.compared
        },
        "skipped steps (not finite)": str(sum("nonfinite" in m for m in metrics)),
        "seconds, all of the demo": f"{found.seconds:.1f}",
        "device": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "versions": f"pera-fast {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "seed": str(cfg.train.seed),
    }
