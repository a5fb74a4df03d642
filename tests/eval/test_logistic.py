"""Logistic regressions of many strengths at once, against scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from pera_fast.eval import lbfgs, logistic

SOME = torch.tensor([1e-4, 1e-2, 1.0, 30.0], dtype=torch.float64)


def points(count: int, width: int = 6, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping classes in directions of unlike scales."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % classes
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    scales = 10.0 ** torch.linspace(-2, 2, width)
    return (centres[targets] + torch.randn(count, width, generator=generator)) * scales, targets


def standardised(features: torch.Tensor) -> np.ndarray:
    return ((features - features.mean(0)) / features.std(0, correction=0)).numpy().astype(np.float64)


@pytest.mark.parametrize("count", [200, 5])
def test_softmax_is_that_of_scikit_learn(count: int) -> None:
    """Also with fewer samples than features."""
    features, targets = points(count)
    found = logistic.fit(features, targets, 3, SOME, tolerance=1e-6)
    assert found.converged == 1
    ours = found.logits(features).softmax(2)
    for strength, probability in zip(SOME.tolist(), ours, strict=True):
        theirs = LogisticRegression(C=strength, tol=1e-9, max_iter=10_000).fit(standardised(features), targets.numpy())
        assert np.abs(theirs.predict_proba(standardised(features)) - probability.numpy()).max() < 2e-3


def test_one_against_the_rest_is_that_of_scikit_learn() -> None:
    features, labels = points(120)
    targets = torch.stack([labels == 0, labels != 1, features[:, 0] > 0], 1).float()
    ours = logistic.fit(features, targets, 3, SOME, tolerance=1e-6).logits(features).sigmoid()
    for strength, probability in zip(SOME.tolist(), ours, strict=True):
        for label in range(3):
            theirs = LogisticRegression(C=strength, tol=1e-9, max_iter=10_000)
            theirs.fit(standardised(features), targets[:, label].numpy())
            expected = theirs.predict_proba(standardised(features))[:, 1]
            assert np.abs(expected - probability[:, label].numpy()).max() < 2e-3


def test_batches_give_what_all_at_once_give(monkeypatch: pytest.MonkeyPatch) -> None:
    features, targets = points(90)
    whole = logistic.fit(features, targets, 3, SOME, tolerance=1e-6).logits(features)
    monkeypatch.setitem(logistic._BUDGET, "cpu", 1)
    assert (logistic.fit(features, targets, 3, SOME, tolerance=1e-6).logits(features) - whole).abs().max() < 1e-2


def test_features_without_variance_and_classes_without_samples() -> None:
    features, targets = points(60)
    features[:, 2] = 7.0
    found = logistic.fit(features, targets, 5)
    logits = found.logits(features)
    assert logits.isfinite().all()
    assert (logits.argmax(2) < 3).all()
    assert found.converged == 1


def test_the_range_is_forty_values() -> None:
    assert len(logistic.STRENGTHS) == 40
    assert logistic.STRENGTHS[[0, -1]].log10().tolist() == pytest.approx([-6, 5])


def test_functions_that_end_at_unlike_times() -> None:
    """Quadratics and a quartic; the number of evaluations of the easy ones is small."""
    asked = torch.zeros(3)
    centres = torch.tensor([1.0, -2.0, 0.5])

    def function(point: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        asked[rows] += 1
        apart = point - centres[rows][:, None]
        power = torch.where(rows == 2, 4.0, 2.0)[:, None]
        return apart.abs().pow(power).sum((0, 2)), power * apart.sign() * apart.abs().pow(power - 1)

    start = torch.zeros(2, 3, 2)
    found, converged = lbfgs.minimise(function, start, torch.full((2, 3, 1), 0.5), tolerance=1e-6)
    assert converged.all()
    assert (found[:, :2] - centres[:2, None]).abs().max() < 1e-5
    assert (found[:, 2] - centres[2]).abs().max() < 1e-2
    assert asked[0] == asked[1] == 2, "the scale is the exact inverse curvature"
    assert asked[2] > 5


def test_steps_that_are_too_long_are_halved() -> None:
    def function(point: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (1 + point.square()).sqrt().sum((0, 2)), point / (1 + point.square()).sqrt()

    start = torch.full((1, 1, 1), 5.0)
    found, converged = lbfgs.minimise(function, start, torch.full((1, 1, 1), 1000.0), tolerance=1e-5)
    assert converged.all()
    assert found.abs().max() < 1e-4
    _, converged = lbfgs.minimise(function, start, torch.full((1, 1, 1), 1000.0), tolerance=1e-5, iterations=1)
    assert not converged.any()
