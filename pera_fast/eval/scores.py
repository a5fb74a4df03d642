"""Scores of classifications, and their intervals over resamples of the test set."""

from collections.abc import Callable

import numpy as np

from pera_fast.keyed import Purpose, generator

RESAMPLES = 200
CONFIDENCE = 0.95


def resamples(count: int, seed: int, draws: int = RESAMPLES) -> np.ndarray:
    """Draw resamples of `count` test samples with replacement: times that each is drawn, int64 [draws, count].

    The same for every network and probe, so that their intervals are of the same resamples.
    """
    rng = generator(seed, Purpose.BOOTSTRAP)
    return rng.multinomial(count, np.full(count, 1 / count), size=draws)


def interval(values: np.ndarray, value: float) -> tuple[float, float]:
    """Bounds of the middle 95 % of values over resamples, moved so that their mean is the value itself.

    Repeated samples move some scores by themselves: a mean average precision up, a macro F1 down.
    """
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.clip(np.percentile(values, [tail, 100 - tail]) + value - values.mean(), 0, 1)
    return min(float(low), value), max(float(high), value)


def accuracies(truth: np.ndarray, predicted: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Share of right predictions in each resample: int [N], int [N], int [R, N] -> [R]."""
    return counts @ (truth == predicted) / counts.sum(1)


def macro_f1s(truth: np.ndarray, predicted: np.ndarray, counts: np.ndarray, classes: int) -> np.ndarray:
    """Mean F1 over the classes that are in the truth or the predictions, in each resample.

    Args:
        truth, predicted: int [N], one class each; or bool [N, C], several.
        counts: int [R, N], from `resamples`.
        classes: C.

    Returns:
        [R].
    """
    right, known, said = _tallies(truth, predicted, counts, classes)
    present = (known + said) > 0
    f1 = 2 * right / np.maximum(known + said, 1)
    return (f1 * present).sum(1) / np.maximum(present.sum(1), 1)


def micro_f1s(truth: np.ndarray, predicted: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """F1 over all labels of all classes in each resample: bool [N, C], bool [N, C], int [R, N] -> [R]."""
    right, known, said = (part.sum(1) for part in _tallies(truth, predicted, counts, truth.shape[1]))
    return 2 * right / np.maximum(known + said, 1)


def _tallies(
    truth: np.ndarray, predicted: np.ndarray, counts: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right, true and predicted samples of each class in each resample, each [R, C]."""
    if truth.ndim == 1:
        truth, predicted = (labels[:, None] == np.arange(classes) for labels in (truth, predicted))
    return counts @ (truth & predicted).astype(float), counts @ truth.astype(float), counts @ predicted.astype(float)


def mean_average_precisions(truth: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean over classes of the average precision, in each resample; over classes that a resample has samples of.

    Args:
        truth: bool [N, C].
        scores: float [N, C], more is likelier; equal scores count as one step, as in scikit-learn.
        counts: int [R, N], from `resamples`.

    Returns:
        [R].
    """
    total, present = np.zeros(len(counts)), np.zeros(len(counts))
    for label in range(truth.shape[1]):
        order = np.argsort(-scores[:, label], kind="stable")
        ranked, right = scores[order, label], truth[order, label]
        last = np.searchsorted(-ranked, -ranked, side="right") - 1  # of the samples of the same score
        seen = np.cumsum(counts[:, order], 1)
        hits = np.cumsum(counts[:, order] * right, 1)
        precision = hits[:, last] / np.maximum(seen[:, last], 1)
        positives = hits[:, -1]
        total += (counts[:, order] * right * precision).sum(1) / np.maximum(positives, 1)
        present += positives > 0
    return total / np.maximum(present, 1)


def spread(score: Callable[[np.ndarray], np.ndarray], counts: np.ndarray, budget: int = 1 << 25) -> tuple[float, float]:
    """The interval of a score of resamples [r, N] -> [r], computed some resamples at a time."""
    step = max(budget // max(counts.shape[1], 1), 1)
    values = np.concatenate([score(counts[at : at + step]) for at in range(0, len(counts), step)])
    return interval(values, float(score(np.ones_like(counts[:1]))[0]))
