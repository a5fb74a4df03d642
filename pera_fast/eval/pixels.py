"""Scores of masks from confusion matrices over pixels: IoU and F1 of each class, accuracy, the best threshold."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pera_fast.eval.scores import interval
from pera_fast.features.masks import IGNORED

BINS, FARTHEST = 4096, 16.0  # of the histogram of margins, and where its ends are


def confusion(truth: np.ndarray, predicted: Tensor, classes: int) -> np.ndarray:
    """Pixels by true class (rows) and predicted class (columns).

    Args:
        truth: int16, any shape, with `IGNORED` for pixels that count for nothing.
        predicted: class numbers of the same shape.
        classes: K.

    Returns:
        int64 [K, K].
    """
    known = torch.from_numpy(np.ascontiguousarray(truth)).to(predicted.device, torch.int64)
    kept = known != IGNORED
    pairs = known[kept] * classes + predicted[kept]
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes).cpu().numpy()


def ious(tables: np.ndarray) -> np.ndarray:
    """Intersection over union of each class: [..., K, K] -> [..., K]; NaN where neither truth nor prediction has it."""
    right, known, said = _sums(tables)
    return _ratio(right, known + said - right)


def f1s(tables: np.ndarray) -> np.ndarray:
    """F1 (Dice) of each class: [..., K, K] -> [..., K]; NaN where neither truth nor prediction has it."""
    right, known, said = _sums(tables)
    return _ratio(2 * right, known + said)


def mean_of_present(values: np.ndarray) -> np.ndarray:
    """Mean over the classes that are there: [..., K] -> [...]; 0 where there is none."""
    there = ~np.isnan(values)
    return np.where(there, values, 0).sum(-1) / np.maximum(there.sum(-1), 1)


def accuracy(tables: np.ndarray) -> np.ndarray:
    """Share of pixels whose class is right: [..., K, K] -> [...]."""
    right, known, _ = _sums(tables)
    return right.sum(-1) / np.maximum(known.sum(-1), 1)


def spread(tables: np.ndarray, counts: np.ndarray, score: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """Interval of a score over resamples of images.

    Args:
        tables: int64 [N, K, K], a confusion matrix for each image.
        counts: int64 [R, N], from `scores.resamples`.
        score: of confusion matrices [R, K, K] -> [R].
    """
    return interval(score(np.tensordot(counts, tables, axes=1)), float(score(tables.sum(0)[None])[0]))


def histogram(truth: np.ndarray, margin: Tensor) -> np.ndarray:
    """Pixels by margin, of class 0 and of class 1: int64 [2, BINS].

    Args:
        truth: int16, any shape: 0, 1 or `IGNORED`.
        margin: logit of class 1 minus that of class 0, of the same shape.
    """
    known = torch.from_numpy(np.ascontiguousarray(truth)).to(margin.device, torch.int64)
    place = ((margin + FARTHEST) * (BINS / (2 * FARTHEST))).floor().clamp(0, BINS - 1).to(torch.int64)
    kept = known != IGNORED
    return torch.bincount(known[kept] * BINS + place[kept], minlength=2 * BINS).view(2, BINS).cpu().numpy()


def best_threshold(counts: np.ndarray) -> tuple[float, float]:
    """The margin from which on pixels are of class 1, for the best F1, and that F1.

    Args:
        counts: int64 [2, BINS], from `histogram`.

    Returns:
        The threshold, a bin's lower edge; 0 (the likelier class) where there is no pixel of class 1.
    """
    wrong, right = (part[::-1].cumsum()[::-1] for part in counts)  # predicted, where pixels from a bin on are class 1
    total = counts[1].sum()
    if not total:
        return 0.0, 0.0
    f1 = 2 * right / (right + wrong + total)
    best = int(f1.argmax())
    return best * (2 * FARTHEST / BINS) - FARTHEST, float(f1[best])


def _sums(tables: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right, true and predicted pixels of each class, each [..., K]."""
    return np.diagonal(tables, axis1=-2, axis2=-1), tables.sum(-1), tables.sum(-2)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above / below, np.nan)
