"""Probes of frozen features: logistic regression and k nearest neighbours, settings chosen on a validation part."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pera_fast.eval import kinds, logistic
from pera_fast.eval.task import Rows
from pera_fast.features.knn import knn_shares

_KNN: dict[str, tuple[int, float | None]] = {"knn20": (20, 0.07), "knn5": (5, None)}  # neighbours, temperature
PROBES = {"linear": "logistic regression", "knn20": "kNN, k=20, cosine", "knn5": "kNN, k=5, Euclidean"}
FIRST_C = 1.0  # where there is no sample to choose on


@dataclass(frozen=True)
class Tried:
    """A probe on a pooling.

    Attributes:
        scores: [M, C] of the test samples.
        val: its headline metric on the validation part, by which poolings are chosen.
        threshold: a score above it says that a scene has the label, where it may have several.
        strength: C of logistic regression.
        converged: whether every search of it ended by its tolerance.
    """

    scores: Tensor
    val: float
    threshold: float
    strength: float | None = None
    converged: bool = True


def attempt(probe: str, features: Tensor, labelled: Tensor, rows: Rows, count: int, kind: kinds.Kind) -> Tried:
    """Choose a probe's settings on the validation part, then let it learn from all labelled rows.

    Args:
        probe: one of `PROBES`.
        features: [N + M, D], labelled samples first, on the device that computes.
        labelled: targets of the N labelled samples.
        rows: the labelled samples that are used.
        count: N.
        kind: of the labels.
    """
    test = features[count:]
    if probe == "linear":
        return _linear(features, labelled, rows, test, kind)
    k, temperature = _KNN[probe]
    shares = kind.shares(labelled).to(features.device)

    def voted(known: np.ndarray, asked: Tensor) -> Tensor:
        index = torch.from_numpy(known).to(features.device)
        return knn_shares(features[index], shares[index], asked, k, temperature).cpu()

    val = kind.score(labelled[rows.val], voted(rows.fit, features[rows.val])) if len(rows.val) else 0.0
    return Tried(voted(rows.all, test), val, 0.5)


def _linear(features: Tensor, labelled: Tensor, rows: Rows, test: Tensor, kind: kinds.Kind) -> Tried:
    targets, classes = labelled.to(features.device), len(kind.classes)
    strength, val, converged = FIRST_C, 0.0, True
    if len(rows.val):
        every = logistic.fit(features[rows.fit], targets[rows.fit], classes)
        scores = every.logits(features[rows.val]).cpu()
        found = [kind.score(labelled[rows.val], one) for one in scores]
        equals = np.flatnonzero(np.array(found) == max(found))
        best = int(equals[len(equals) // 2])  # the middle of equals, far from where the fit gets worse
        strength, val, converged = float(logistic.STRENGTHS[best]), found[best], every.converged == 1
    last = logistic.fit(features[rows.all], targets[rows.all], classes, torch.tensor([strength], dtype=torch.float64))
    return Tried(last.logits(test)[0].cpu(), val, 0.0, strength, converged and last.converged == 1)
