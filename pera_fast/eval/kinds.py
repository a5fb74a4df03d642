"""Two kinds of scenes: with one label each, and with several; how each is learned, chosen by and measured."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pera_fast.eval import scores as resampled
from pera_fast.features.samples import Samples

Measured = dict[str, tuple[float, tuple[float, float]]]  # name -> value and its interval


class Kind(Protocol):
    """Labels of a kind.

    Attributes:
        classes: their names.
        headline: the metric that networks are compared by, and settings chosen by.
    """

    classes: tuple[str, ...]
    headline: str

    def targets(self, samples: Samples) -> Tensor:
        """Labels as `logistic.fit` takes them."""
        ...

    def shares(self, targets: Tensor) -> Tensor:
        """Labels as `knn_shares` takes them: [N, C] of 0 and 1."""
        ...

    def score(self, targets: Tensor, scores: Tensor) -> float:
        """The headline metric of scores [N, C]."""
        ...

    def measure(self, targets: Tensor, scores: Tensor, threshold: float, counts: np.ndarray) -> Measured:
        """All metrics of scores [N, C], with intervals over resamples; a score above the threshold says yes."""
        ...


class OneLabel:
    """Scenes with one label each: accuracy and macro F1."""

    headline = "accuracy"

    def __init__(self, classes: tuple[str, ...]):
        self.classes = classes

    def targets(self, samples: Samples) -> Tensor:
        return torch.tensor([labels[0] for labels in samples.labels])

    def shares(self, targets: Tensor) -> Tensor:
        return F.one_hot(targets, len(self.classes)).float()

    def score(self, targets: Tensor, scores: Tensor) -> float:
        return (scores.argmax(1) == targets).float().mean().item()

    def measure(self, targets: Tensor, scores: Tensor, threshold: float, counts: np.ndarray) -> Measured:
        from sklearn.metrics import accuracy_score, f1_score

        truth, said = targets.numpy(), scores.argmax(1).cpu().numpy()
        classes = len(self.classes)
        return {
            "accuracy": (
                float(accuracy_score(truth, said)),
                resampled.spread(lambda drawn: resampled.accuracies(truth, said, drawn), counts),
            ),
            "macro_f1": (
                float(f1_score(truth, said, average="macro")),
                resampled.spread(lambda drawn: resampled.macro_f1s(truth, said, drawn, classes), counts),
            ),
        }


class SeveralLabels:
    """Scenes with several labels each: mean average precision, micro and macro F1."""

    headline = "mean_average_precision"

    def __init__(self, classes: tuple[str, ...]):
        self.classes = classes

    def targets(self, samples: Samples) -> Tensor:
        found = torch.zeros(len(samples), len(self.classes))
        for row, labels in zip(found, samples.labels, strict=True):
            row[list(labels)] = 1
        return found

    def shares(self, targets: Tensor) -> Tensor:
        return targets

    def score(self, targets: Tensor, scores: Tensor) -> float:
        per_class = average_precisions(targets, scores)
        return float(np.mean(per_class[~np.isnan(per_class)])) if not np.isnan(per_class).all() else 0.0

    def measure(self, targets: Tensor, scores: Tensor, threshold: float, counts: np.ndarray) -> Measured:
        from sklearn.metrics import f1_score

        truth, ranked = targets.bool().numpy(), scores.cpu().numpy()
        said, classes = ranked > threshold, len(self.classes)
        return {
            "mean_average_precision": (
                self.score(targets, scores),
                resampled.spread(lambda drawn: resampled.mean_average_precisions(truth, ranked, drawn), counts),
            ),
            "micro_f1": (
                float(f1_score(truth, said, average="micro")),
                resampled.spread(lambda drawn: resampled.micro_f1s(truth, said, drawn), counts),
            ),
            "macro_f1": (
                _macro_f1(truth, said),
                resampled.spread(lambda drawn: resampled.macro_f1s(truth, said, drawn, classes), counts),
            ),
        }


def average_precisions(targets: Tensor, scores: Tensor) -> np.ndarray:
    """Average precision of each class [C]; not a number where the targets have none of it."""
    from sklearn.metrics import average_precision_score

    truth, ranked = targets.numpy(), scores.cpu().numpy()
    return np.array(
        [
            average_precision_score(truth[:, label], ranked[:, label]) if truth[:, label].any() else np.nan
            for label in range(truth.shape[1])
        ]
    )


def _macro_f1(truth: np.ndarray, said: np.ndarray) -> float:
    """Mean F1 over the classes that are in the truth or the predictions, as of scenes with one label."""
    from sklearn.metrics import f1_score

    present = np.flatnonzero(truth.any(0) | said.any(0))
    return float(f1_score(truth, said, labels=present, average="macro")) if len(present) else 0.0


def kind_of(samples: Samples) -> Kind:
    """The kind of the labels of some scenes."""
    return SeveralLabels(samples.classes) if samples.several else OneLabel(samples.classes)


def confusion(targets: Tensor, scores: Tensor, classes: Sequence[Any]) -> np.ndarray:
    """Samples of each true class (rows) by predicted class (columns): int [C, C]."""
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(targets.numpy(), scores.argmax(1).cpu().numpy(), labels=np.arange(len(classes)))
