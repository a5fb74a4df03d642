"""Scores over resamples, against scikit-learn's of the same samples repeated."""

import numpy as np
import pytest
from sklearn import metrics

from pera_fast.eval import scores


@pytest.fixture
def labels():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, 60)
    said = np.where(rng.random(60) < 0.6, truth, rng.integers(0, 4, 60))
    return truth, said, scores.resamples(60, seed=1, draws=5)


def test_resamples_are_keyed_and_of_the_same_size() -> None:
    drawn = scores.resamples(40, seed=3)
    assert drawn.shape == (200, 40)
    assert (drawn.sum(1) == 40).all()
    assert (drawn == scores.resamples(40, seed=3)).all()
    assert (drawn != scores.resamples(40, seed=4)).any()
    assert abs((drawn == 0).mean() - np.exp(-1)) < 0.02, "a sample is left out of a resample about every third time"


def test_accuracy_and_macro_f1(labels) -> None:
    truth, said, counts = labels
    for row, weight in enumerate(counts):
        repeated = np.repeat(np.arange(60), weight)
        expected = metrics.accuracy_score(truth[repeated], said[repeated])
        assert scores.accuracies(truth, said, counts)[row] == pytest.approx(expected)
        expected = metrics.f1_score(truth[repeated], said[repeated], average="macro")
        assert scores.macro_f1s(truth, said, counts, 6)[row] == pytest.approx(expected)


def test_f1_of_several_labels(labels) -> None:
    truth, said, counts = (np.eye(5, dtype=bool)[labels[0]], np.eye(5, dtype=bool)[labels[1]], labels[2])
    truth[:, 4] |= truth[:, 1]
    for row, weight in enumerate(counts):
        repeated = np.repeat(np.arange(60), weight)
        expected = metrics.f1_score(truth[repeated], said[repeated], average="micro")
        assert scores.micro_f1s(truth, said, counts)[row] == pytest.approx(expected)


@pytest.mark.parametrize("ties", [False, True])
def test_mean_average_precision(ties: bool) -> None:
    rng = np.random.default_rng(5)
    truth, ranked = rng.random((50, 4)) < 0.3, rng.random((50, 4))
    truth[:, 3] = False
    if ties:
        ranked = np.round(4 * ranked) / 4
    counts = scores.resamples(50, seed=2, draws=4)
    found = scores.mean_average_precisions(truth, ranked, counts)
    for value, weight in zip(found, counts, strict=True):
        expected = metrics.average_precision_score(truth[:, :3], ranked[:, :3], sample_weight=weight)
        assert value == pytest.approx(expected)


def test_interval_holds_the_value_and_narrows_with_samples() -> None:
    wide, narrow = [], []
    for count, found in ((50, wide), (5000, narrow)):
        truth = np.zeros(count, int)
        said = (np.arange(count) % 10 < 3).astype(int)
        found += scores.spread(
            lambda drawn, t=truth, s=said: scores.accuracies(t, s, drawn), scores.resamples(count, 0)
        )
    assert wide[0] < 0.7 < wide[1]
    assert narrow[0] < 0.7 < narrow[1]
    assert narrow[1] - narrow[0] < 0.2 * (wide[1] - wide[0])


def test_interval_lies_around_the_value_although_resamples_lie_beside_it() -> None:
    rng = np.random.default_rng(1)
    truth, ranked = rng.random((60, 20)) < 0.05, rng.random((60, 20))
    counts = scores.resamples(60, seed=0)
    values = scores.mean_average_precisions(truth, ranked, counts)
    value = float(scores.mean_average_precisions(truth, ranked, np.ones_like(counts[:1]))[0])
    assert values.mean() > value + 0.01, "a sample that is drawn twice is ranked beside itself"
    low, high = scores.spread(lambda drawn: scores.mean_average_precisions(truth, ranked, drawn), counts)
    assert (low + high) / 2 == pytest.approx(value, abs=0.02)
    assert high - low == pytest.approx(np.subtract(*np.percentile(values, [97.5, 2.5])))
