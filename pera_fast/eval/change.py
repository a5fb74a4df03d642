"""Change detection on frozen patch features: a head on |f1 - f2| of two images of a place, scored by pixel.

A pixel is called changed where its margin (the logit of change minus the other) reaches a threshold. The threshold
with the best F1 is chosen on labelled pairs that the head for it did not learn from; then a head learns from all.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from pera_fast.eval import dense_report, pixels
from pera_fast.eval.dense import Dense, Measured, Split, examples, joined_measures, prepare
from pera_fast.eval.scores import resamples
from pera_fast.eval.task import Options, Parts, Probe, TaskResult
from pera_fast.features.extract import Extractor

FEW = 40  # labelled pairs up to which a threshold is chosen on all of them, each judged by a head that it did not teach
INNER_FOLDS = 3


def begin(parts: Parts, extractor: Extractor, options: Options) -> Probe:
    """Extract differences of patch features of all pairs, once for every share of the labels."""
    dense = prepare(parts, extractor, options)
    return lambda share: _result(dense, share)


def _result(dense: Dense, share: float) -> TaskResult:
    splits, seed = dense.splits(share), dense.options.seed
    drawn, thresholds, found = examples(splits), [], []
    for split in splits:
        threshold = _threshold(dense, split)
        thresholds.append(threshold)
        head = dense.fit(split.labelled, seed)
        found.append(
            dense.measure(head, split.test, lambda logits, at=threshold: (_margin(logits) >= at).long(), drawn)
        )
    return _scored(dense, joined_measures(found), thresholds)


def _margin(logits: Tensor) -> Tensor:
    return logits[1] - logits[0]


def _threshold(dense: Dense, split: Split) -> float:
    """The margin with the best F1 on labelled pairs that were held out; 0 where none can be."""
    seed, counts = dense.options.seed, np.zeros((2, pixels.BINS), np.int64)
    for fit, val in _held_out(split, seed):
        head = dense.fit(fit, seed, "head for the threshold")
        for _, logits, truth in dense.logits(head, val):
            counts += pixels.histogram(truth, _margin(logits))
    return pixels.best_threshold(counts)[0]


def _held_out(split: Split, seed: int) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Pairs to learn from and pairs to choose on; of few pairs, several folds of all of them."""
    if not split.val or len(split.labelled) > FEW:
        return [(split.fit, split.val)] if split.val else []
    mixed = np.random.default_rng(seed).permutation(split.labelled).tolist()
    folds = [mixed[fold::INNER_FOLDS] for fold in range(min(INNER_FOLDS, len(mixed)))]
    return [([row for row in mixed if row not in held], held) for held in folds]


def _scored(dense: Dense, found: Measured, thresholds: Sequence[float]) -> TaskResult:
    tables = np.stack(list(found.tables.values()))
    table, counts = tables.sum(0), resamples(len(tables), dense.options.seed)
    scores = {
        "changed_f1": lambda some: np.nan_to_num(pixels.f1s(some)[..., 1]),
        "changed_iou": lambda some: np.nan_to_num(pixels.ious(some)[..., 1]),
        "pixel_accuracy": pixels.accuracy,
    }
    metrics = {name: float(score(table)) for name, score in scores.items()}
    intervals = {name: pixels.spread(tables, counts, score) for name, score in scores.items()}
    everything = np.zeros_like(table)
    everything[:, 1] = table.sum(1)  # as if all were called changed
    metrics |= {
        "all_changed_f1": float(np.nan_to_num(pixels.f1s(everything)[1])),
        "precision": float(table[1, 1] / max(table[:, 1].sum(), 1)),
        "recall": float(table[1, 1] / max(table[1].sum(), 1)),
    }
    columns = ("changed_f1", "changed_iou", "all_changed_f1", "precision", "recall")
    notes = list(dense.notes)
    if metrics["changed_f1"] <= metrics["all_changed_f1"]:
        notes.append("F1 of change is not above that of calling every pixel changed: these features tell nothing here")
    sections = [
        dense_report.by_class(table, dense.classes),
        dense_report.pictures(dense, found.masks),
    ]
    details = {**dense.details, "thresholds": list(thresholds), "confusion": table.tolist()}
    return TaskResult("changed_f1", metrics, columns, intervals, sections, notes, details, dense.classes)
