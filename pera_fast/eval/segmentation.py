"""Semantic segmentation on frozen patch features: a linear or a small convolutional head, its masks scored by pixel."""

import numpy as np

from pera_fast.eval import dense_report, pixels
from pera_fast.eval.dense import Dense, examples, joined_measures, prepare
from pera_fast.eval.scores import resamples
from pera_fast.eval.task import Options, Parts, Probe, TaskResult
from pera_fast.features.extract import Extractor

_FEW = 4  # classes up to which the table over networks has a column for each


def begin(parts: Parts, extractor: Extractor, options: Options) -> Probe:
    """Extract patch features of all images, once for every share of the labels."""
    dense = prepare(parts, extractor, options)
    return lambda share: _result(dense, share)


def _result(dense: Dense, share: float) -> TaskResult:
    splits, seed = dense.splits(share), dense.options.seed
    drawn = examples(splits)
    # Nothing is chosen on the validation part, so a head learns from it too.
    found = joined_measures(
        [
            dense.measure(dense.fit(split.labelled, seed), split.test, lambda logits: logits.argmax(0), drawn)
            for split in splits
        ]
    )
    tables = np.stack(list(found.tables.values()))
    table, counts = tables.sum(0), resamples(len(tables), seed)
    iou, f1 = pixels.ious(table), pixels.f1s(table)
    scores = {
        "miou": lambda some: pixels.mean_of_present(pixels.ious(some)),
        "mean_f1": lambda some: pixels.mean_of_present(pixels.f1s(some)),
        "pixel_accuracy": pixels.accuracy,
    }
    metrics = {name: float(score(table)) for name, score in scores.items()}
    intervals = {name: pixels.spread(tables, counts, score) for name, score in scores.items()}
    there = [number for number in range(len(dense.classes)) if not np.isnan(iou[number])]
    metrics |= {f"iou.{dense.classes[number]}": float(iou[number]) for number in there}
    metrics |= {f"f1.{dense.classes[number]}": float(f1[number]) for number in there}
    by_class = [f"iou.{dense.classes[number]}" for number in there] if len(there) <= _FEW else []
    sections = [
        dense_report.by_class(table, dense.classes),
        dense_report.pictures(dense, found.masks),
    ]
    details = {**dense.details, "confusion": table.tolist()}
    return TaskResult(
        "miou", metrics, (*scores, *by_class), intervals, sections, list(dense.notes), details, dense.classes
    )
