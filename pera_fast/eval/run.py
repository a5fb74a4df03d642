"""Evaluates frozen weights on a task: loops over weights and shares of the labels, writes the report and the JSON."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from pera_fast import __version__
from pera_fast.config.keys import did_you_mean
from pera_fast.durable import whole_file
from pera_fast.errors import UserError
from pera_fast.eval.task import HEADS, Options, Parts, Probe, TaskResult, parts_of, with_masks
from pera_fast.features.extract import POOLINGS, Extractor, choose_device
from pera_fast.features.samples import TASKS, Samples, read_samples
from pera_fast.paths import local_path, refuse_inside
from pera_fast.weights.backbone import Backbone, random_backbone
from pera_fast.weights.load import load_backbone

REPORT, NUMBERS = "report.html", "report.json"
Weights = str | os.PathLike[str] | Backbone


@dataclass(frozen=True)
class Entry:
    """One row of the table: a network at a share of the labels.

    Attributes:
        weights: what `--weights` named.
        share: of the labels, in (0, 1].
        labelled: samples that were learned from, those to choose settings on included.
        result: of the task.
        seconds: of features, counted once per network, and of this share's probes.
    """

    weights: str
    share: float
    labelled: int
    result: TaskResult
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """Results of `evaluate`.

    Attributes:
        task: scene, segmentation or change.
        samples: the data.
        parts: labelled and test samples.
        entries: networks in the order given, each with its shares of the labels, the largest first.
        settings: of the evaluation, for the report.
        report, numbers: the HTML and the JSON file; None where no folder was given.
    """

    task: str
    samples: Samples
    parts: Parts
    entries: tuple[Entry, ...]
    settings: dict[str, Any]
    report: Path | None = None
    numbers: Path | None = None

    @property
    def largest(self) -> tuple[Entry, ...]:
        """One entry a network: that of the largest share of the labels."""
        share = max(entry.share for entry in self.entries)
        return tuple(entry for entry in self.entries if entry.share == share)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes: of the scenes, or of the masks."""
        return self.samples.classes or self.entries[0].result.classes

    @property
    def notes(self) -> list[str]:
        """A line for each thing that a reader of the numbers should know."""
        told: list[str] = []
        for entry in self.entries:
            at = f"{entry.weights}, {100 * entry.share:g} % of the labels" if entry.share < 1 else entry.weights
            told += [f"{at}: {note}" for note in entry.result.notes]
        return list(dict.fromkeys(told))


def evaluate(
    task: str,
    data: str | os.PathLike[str] | Samples,
    weights: Weights | Sequence[Weights],
    out: str | os.PathLike[str] | None = None,
    *,
    root: str | os.PathLike[str] | None = None,
    size: int | None = None,
    labels: Sequence[float] = (1.0,),
    poolings: Sequence[str] = POOLINGS,
    seed: int = 0,
    device: str = "auto",
    precision: str | None = None,
    batch_size: int = 64,
    heads: int | None = None,
    head: str = "linear",
    layers: int = 4,
    classes: Sequence[str] = (),
    ignore: int | None = None,
    folds: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Evaluates frozen weights on labelled images; the twin of `pera-fast eval`.

    Args:
        task: scene, segmentation or change.
        data: a CSV or a folder, as `features.samples.read_samples` takes it, or samples that were read.
        weights: one or several: what `weights.load.load_backbone` takes, or a `Backbone`. `random` beside others has
            the sizes of the first of them.
        out: folder for report.html and report.json. None: nothing is written.
        root: folder of the paths in a CSV.
        size: pixels a side that the network sees: of a scene, which is resized; of a tile of an image with a mask,
            which is not. None: that of its global crops; for tiles by `eval.dense.network_size`.
        labels: shares of the labels to learn from, each in (0, 1].
        poolings: of cls, mean, both; for scenes.
        seed: of splits, shares, probes and random weights.
        device: cpu, cuda or auto.
        precision: bf16, fp16 or fp32, of the network. None: bf16 on a GPU, else fp32.
        batch_size: images at a time.
        heads: attention heads, for a file that does not say.
        head: for masks, linear or conv.
        layers: for masks, blocks whose features the head sees, evenly spread.
        classes: names of the classes 0, 1, ... of masks. Empty: the numbers that the training masks hold.
        ignore: value of masks whose pixels count for nothing.
        folds: of a cross-validation over all samples with masks, whatever their splits; 0: none.
        overwrite: replace a report that is there.
        progress: show progress bars, on a terminal.

    Returns:
        The results, and where the report is.

    Raises:
        UserError: an option, the data or the weights are wrong; one line says why.
    """
    if task not in TASKS:
        raise UserError(f"--task {task}: no such task; known: {', '.join(TASKS)}{did_you_mean(task, TASKS)}")
    shares, poolings = _shares(labels), _poolings(poolings)
    given = [weights] if isinstance(weights, str | os.PathLike | Backbone) else list(weights)
    named = _named(given, seed)
    folder = None if out is None else _free_folder(out, data, overwrite)
    options = Options(
        choose_device(device), poolings, seed, progress, size, _head(head), layers, tuple(classes), ignore, folds
    )
    if task == "scene" and (classes or ignore is not None or folds):
        raise UserError("--classes, --ignore and --folds are for masks; leave them out for --task scene")
    samples = (
        data if isinstance(data, Samples) else read_samples(task, Path(data), None if root is None else Path(root))
    )
    parts = parts_of(samples, seed) if task == "scene" else with_masks(samples, options)

    def opened(wanted: Weights) -> Extractor:
        backbone = wanted if isinstance(wanted, Backbone) else load_backbone(wanted, heads, seed)
        return Extractor(backbone, options.device, size, precision, batch_size)

    extractor = None
    for wanted in named.values():  # what is wrong with the last weights is said before the first take their time
        extractor = opened(wanted)
        _check(extractor, samples)
    if folder is not None:
        _make(folder)
    entries: list[Entry] = []
    for name, wanted in named.items():
        if extractor is None or len(named) > 1:  # several may not fit into memory side by side
            extractor = opened(wanted)
        entries += _entries(task, name, extractor, parts, shares, options)
    settings = _settings(samples, parts, named, size, seed, options.device)
    if folds:
        settings["folds"] = folds
    found = Evaluation(task, samples, parts, tuple(entries), settings)
    return found if folder is None else _written(found, folder)


def _entries(
    task: str, name: str, extractor: Extractor, parts: Parts, shares: Sequence[float], options: Options
) -> list[Entry]:
    began = time.perf_counter()
    probe: Probe = import_module(f"pera_fast.eval.{task}").begin(parts, extractor, options)
    entries, extracting = [], time.perf_counter() - began
    for share in shares:
        began = time.perf_counter()
        result = probe(share)
        if extractor.backbone.notes and not entries:
            result = replace(result, notes=[*extractor.backbone.notes, *result.notes])
        seconds = time.perf_counter() - began + (0.0 if entries else extracting)
        entries.append(Entry(name, share, len(parts.rows(share).all), result, seconds))
    return entries


def _check(extractor: Extractor, samples: Samples) -> None:
    """Raises UserError where the network cannot read the first sample."""
    for path in samples.images[0]:
        try:
            extractor.read(path)
            extractor.read.check_bands(path)
        except UserError as error:
            raise UserError(f"--weights {extractor.backbone.source}: {error}") from None


def _shares(labels: Sequence[float]) -> list[float]:
    """Shares of the labels, the largest first."""
    for share in labels:
        if not 0 < share <= 1:
            raise UserError(f"--labels {share:g}: wants shares above 0 and at most 1, such as 0.01,0.1,1")
    if not labels:
        raise UserError("--labels: wants at least one share, such as 0.01,0.1,1")
    return sorted(set(labels), reverse=True)


def _poolings(poolings: Sequence[str]) -> tuple[str, ...]:
    for name in poolings:
        if name not in POOLINGS:
            hint = did_you_mean(name, POOLINGS)
            raise UserError(f"--pooling {name}: wants some of {', '.join(POOLINGS)}, separated by commas{hint}")
    if not poolings:
        raise UserError(f"--pooling: wants some of {', '.join(POOLINGS)}, separated by commas")
    return tuple(dict.fromkeys(poolings))


def _head(name: str) -> str:
    if name not in HEADS:
        raise UserError(f"--head {name}: wants one of {', '.join(HEADS)}{did_you_mean(name, HEADS)}")
    return name


def _named(given: Sequence[Weights], seed: int) -> dict[str, Weights]:
    """The weights by name, in order; `random` alone becomes that of the sizes of the first others."""
    if not given:
        raise UserError("--weights: give at least one")
    others = [one for one in given if isinstance(one, Backbone) or os.fspath(one).partition(":")[0] != "random"]
    first = next(iter(others), None)
    named: dict[str, Weights] = {}
    for one in given:
        name = one.source if isinstance(one, Backbone) else os.fspath(one)
        if name in named:
            raise UserError(f"--weights {name}: is given twice; give each once")
        if name != "random" or isinstance(one, Backbone) or first is None:
            named[name] = one
        elif isinstance(first, Backbone):
            named[name] = random_backbone(first.cfg.with_values({"train.seed": seed}), name)
        else:
            named[name] = f"random:{os.fspath(first)}"
    return named


def _free_folder(out: str | os.PathLike[str], data: str | os.PathLike[str] | Samples, overwrite: bool) -> Path:
    """The folder for the report. Raises UserError where it cannot be one."""
    folder = local_path("--out", out)
    if not isinstance(data, Samples):
        refuse_inside("--out", folder, data)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file; give a folder")
    for name in (REPORT, NUMBERS):
        if (folder / name).exists() and not overwrite:
            raise UserError(f"--out {folder}: holds {name} already; give another folder, or --overwrite to replace it")
    return folder


def _make(folder: Path) -> None:
    """Make the folder. Raises UserError where nothing can be written there: before hours are spent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / ".writable") as partial:
            partial.touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"--out {folder}: cannot write there ({error.strerror}); give another folder") from None


def _settings(
    samples: Samples, parts: Parts, named: dict[str, Weights], size: int | None, seed: int, device: torch.device
) -> dict[str, Any]:
    return {
        "data": samples.source,
        "train": parts.train_count,
        "val": len(parts.labelled) - parts.train_count,
        "test": len(parts.test),
        "weights": {name: str(getattr(one, "source", one)) for name, one in named.items()},
        "size": size,
        "seed": seed,
        "device": device.type,
        "versions": {"pera-fast": __version__, "torch": str(torch.__version__)},
    }


def numbers(found: Evaluation) -> dict[str, Any]:
    """All numbers of an evaluation as JSON takes them."""
    results = [
        {
            "weights": entry.weights,
            "labels": entry.share,
            "labelled": entry.labelled,
            "headline": entry.result.headline,
            "metrics": entry.result.metrics,
            "intervals": {name: list(bounds) for name, bounds in entry.result.intervals.items()},
            "notes": entry.result.notes,
            "details": entry.result.details,
            "seconds": round(entry.seconds, 3),
        }
        for entry in found.entries
    ]
    return {"task": found.task, **found.settings, "classes": list(found.classes), "results": results}


def _written(found: Evaluation, folder: Path) -> Evaluation:
    from pera_fast.eval.report import report_html  # matplotlib

    texts = {REPORT: report_html(found), NUMBERS: json.dumps(numbers(found), indent=1, allow_nan=False) + "\n"}
    try:
        for name, text in texts.items():
            with whole_file(folder / name) as partial:
                partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {folder}: cannot write there ({error.strerror}); give another folder") from None
    return replace(found, report=folder / REPORT, numbers=folder / NUMBERS)
