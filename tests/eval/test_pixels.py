"""Scores of pixels are scikit-learn's; thresholds are the best there are."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, jaccard_score

from pera_fast.eval import pixels
from pera_fast.features.masks import IGNORED


@pytest.fixture(scope="module")
def labels() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    truth = rng.integers(-1, 4, (13, 17)).astype(np.int16)
    return truth, np.where(rng.random(truth.shape) < 0.6, truth.clip(0), rng.integers(0, 4, truth.shape))


def test_scores_are_those_of_scikit_learn_without_ignored_pixels(labels: tuple[np.ndarray, np.ndarray]) -> None:
    truth, predicted = labels
    table = pixels.confusion(truth, torch.from_numpy(predicted), 4)
    kept = truth != IGNORED
    known, said = truth[kept], predicted[kept]
    assert table.tolist() == confusion_matrix(known, said).tolist()
    np.testing.assert_allclose(pixels.ious(table), jaccard_score(known, said, average=None))
    np.testing.assert_allclose(pixels.f1s(table), f1_score(known, said, average=None))
    assert pixels.accuracy(table) == pytest.approx(accuracy_score(known, said))
    assert pixels.mean_of_present(pixels.ious(table)) == pytest.approx(jaccard_score(known, said, average="macro"))


def test_a_class_that_is_nowhere_counts_for_nothing_and_one_only_predicted_counts_0() -> None:
    table = np.array([[5, 1, 0], [0, 0, 0], [0, 0, 0]])
    assert pixels.ious(table)[:2].tolist() == [5 / 6, 0]
    assert np.isnan(pixels.ious(table)[2])
    assert pixels.mean_of_present(pixels.ious(table)) == pytest.approx(5 / 12)
    assert pixels.mean_of_present(pixels.f1s(0 * table)) == 0


def test_interval_is_of_tables_summed_over_resampled_images() -> None:
    tables = np.array([[[3, 1], [0, 2]], [[1, 0], [4, 1]]])
    counts = np.array([[2, 0], [0, 2], [1, 1]])
    each = [float(pixels.accuracy(table)) for table in (tables[0], tables[1], tables.sum(0))]
    low, high = pixels.spread(tables, counts, pixels.accuracy)
    assert min(each) <= low < high <= max(each)


def test_best_threshold_is_that_of_all_thresholds() -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(-1, 2, (40, 30)).astype(np.int16)
    margin = rng.normal(0.7 * (truth == 1) - 1, 1)
    threshold, f1 = pixels.best_threshold(pixels.histogram(truth, torch.from_numpy(margin)))
    kept = truth != IGNORED
    scores = [f1_score(truth[kept], margin[kept] >= at) for at in np.linspace(-3, 1, 60)]
    assert f1 == pytest.approx(f1_score(truth[kept], margin[kept] >= threshold))
    assert f1 >= max(scores) - 2e-3  # the width of bins
    assert pixels.best_threshold(np.zeros((2, pixels.BINS), int)) == (0, 0)


def test_margins_beyond_the_ends_are_kept() -> None:
    counts = pixels.histogram(np.array([0, 1, 1], np.int16), torch.tensor([-99.0, 99.0, 15.99]))
    assert counts.sum() == 3
    assert pixels.best_threshold(counts)[1] == 1
