"""Scores of predictions, from counts that add up over batches and images."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pera_fast.features.masks import IGNORED


@dataclass
class Counts:
    """Predictions of K classes against the truth.

    Attributes:
        classes: K.
        matrix: int64 [K, K], rows are true classes, columns predicted ones; of scenes with several labels its diagonal
            is what was found rightly, and `true` and `found` are their numbers.
    """

    classes: int
    matrix: Tensor = field(init=False)
    true: Tensor = field(init=False)
    found: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.matrix = torch.zeros(self.classes, self.classes, dtype=torch.int64)
        self.true, self.found = self.matrix[0].clone(), self.matrix[0].clone()

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """Count class numbers of any shape; pixels whose truth is `IGNORED` are left out."""
        predicted, truth = predicted.cpu().flatten().long(), truth.cpu().flatten().long()
        counted = truth != IGNORED
        pairs = truth[counted] * self.classes + predicted[counted]
        matrix = torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes)
        self.matrix += matrix
        self.true += matrix.sum(1)
        self.found += matrix.sum(0)

    def add_several(self, predicted: Tensor, truth: Tensor) -> None:
        """Count sets of labels, bool [B, K] each."""
        predicted, truth = predicted.cpu().bool(), truth.cpu().bool()
        self.matrix += torch.diag((predicted & truth).sum(0))
        self.true += truth.sum(0)
        self.found += predicted.sum(0)

    @property
    def right(self) -> Tensor:
        """int64 [K]."""
        return self.matrix.diag()

    def f1(self) -> Tensor:
        """float64 [K], 2 right / (true + found); NaN for a class that is neither there nor found."""
        return 2 * self.right.double() / (self.true + self.found)

    def iou(self) -> Tensor:
        """float64 [K], right / (true + found - right); NaN likewise."""
        return self.right.double() / (self.true + self.found - self.right)

    def accuracy(self) -> float:
        """Share of all that was found rightly."""
        return float(self.right.sum() / self.true.sum().clamp(min=1))


def scores(counts: Counts, task: str, several: bool) -> dict[str, float]:
    """Scores of a task, the one that chooses the best network first.

    A change of two classes is judged by its second class, the changed pixels. Means leave out classes that are neither
    there nor found.
    """
    f1, iou = counts.f1(), counts.iou()
    macro = {"macro_f1": float(f1.nanmean())}
    if several:
        micro = 2 * int(counts.right.sum()) / max(int((counts.true + counts.found).sum()), 1)
        return {"f1": micro, **macro}
    if task == "scene":
        return {"accuracy": counts.accuracy(), **macro}
    means = {"miou": float(iou.nanmean()), "accuracy": counts.accuracy(), **macro}
    if task == "change" and counts.classes == 2:
        return {"f1": float(f1[1].nan_to_num(0)), "iou": float(iou[1].nan_to_num(0)), **means}
    return means
