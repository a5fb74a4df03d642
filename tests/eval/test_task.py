"""Parts of the samples, and shares of the labels."""

from pathlib import Path

import numpy as np
import pytest

from pera_fast.errors import UserError
from pera_fast.eval.task import parts_of
from pera_fast.features.samples import Samples


def scenes(counts: dict[str, int], splits: tuple[str, ...] = ()) -> Samples:
    """Scenes of classes, numbers of each; splits are dealt out in turn."""
    labels = [(label,) for label, count in enumerate(counts.values()) for _ in range(count)]
    paths = tuple((Path(f"{row}.png"),) for row in range(len(labels)))
    named = tuple(splits[row % len(splits)] if splits else "" for row in range(len(labels)))
    return Samples("scene", paths, tuple(labels), (), named, tuple(counts), "table")


def test_nobody_gave_splits() -> None:
    samples = scenes({"a": 50, "b": 10})
    parts = parts_of(samples, seed=1)
    assert (len(parts.labelled), len(parts.test), parts.train_count) == (48, 12, 48)
    assert not set(parts.labelled.images) & set(parts.test.images)
    assert parts_of(samples, seed=1).test == parts.test
    assert parts_of(samples, seed=2).test != parts.test


def test_given_splits_are_kept() -> None:
    samples = scenes({"a": 12, "b": 12}, ("train", "val", "test"))
    parts = parts_of(samples)
    rows = parts.rows(1.0)
    assert [parts.labelled.splits[row] for row in rows.fit] == ["train"] * 8
    assert [parts.labelled.splits[row] for row in rows.val] == ["val"] * 8
    assert set(parts.test.splits) == {"test"}
    few = parts.rows(0.01)
    assert len(few.fit) == len(few.val) == 2, "one of each class"


def test_a_validation_part_is_held_out() -> None:
    parts = parts_of(scenes({"a": 40, "b": 10, "c": 2}, ("train", "train", "train", "train", "test")))
    rows = parts.rows(1.0)
    assert sorted([*rows.fit, *rows.val]) == list(range(len(parts.labelled))) == rows.all.tolist()
    labels = np.array([label for (label,) in parts.labelled.labels])
    assert np.bincount(labels[rows.val]).tolist() == [6, 2, 1]


def test_shares_are_nested_by_class_and_keyed() -> None:
    parts = parts_of(scenes({"a": 100, "b": 40}), seed=5)
    labels = np.array([label for (label,) in parts.labelled.labels])
    every = {share: parts.rows(share).all for share in (0.01, 0.1, 0.5, 1.0)}
    assert {share: np.bincount(labels[rows]).tolist() for share, rows in every.items()} == {
        0.01: [2, 2], 0.1: [8, 3], 0.5: [40, 16], 1.0: [80, 32]
    }  # fmt: skip
    for less, more in ((0.01, 0.1), (0.1, 0.5), (0.5, 1.0)):
        assert set(every[less]) <= set(every[more])
    assert np.array_equal(parts.rows(0.1).all, every[0.1])
    other = parts_of(scenes({"a": 100, "b": 40}), seed=6)
    assert not np.array_equal(other.rows(0.1).all, every[0.1])


def test_every_class_of_several_labels_is_among_the_drawn() -> None:
    labels = tuple((0, 1) if row % 2 else (0,) for row in range(200))
    labels = (*labels[:195], (2,), (0, 2), (2,), (2,), (1, 2))
    paths = tuple((Path(f"{row}.png"),) for row in range(200))
    samples = Samples("scene", paths, labels, (), tuple(["train"] * 199 + ["test"]), ("a", "b", "c"), "table")
    parts = parts_of(samples)
    drawn = parts.rows(0.02).all
    assert len(drawn) <= 6
    for label in range(3):
        assert sum(label in parts.labelled.labels[row] for row in drawn) >= 2


def test_one_sample_with_a_mask_leaves_none_to_choose_on() -> None:
    samples = Samples(
        "segmentation", ((Path("a"),), (Path("b"),)), (), (Path("c"),) * 2, ("train", "test"), (), "table"
    )
    rows = parts_of(samples).rows(0.5)
    assert rows.fit.tolist() == [0]
    assert len(rows.val) == 0


def test_too_few() -> None:
    one = Samples("segmentation", ((Path("a"),),), (), (Path("c"),), ("",), (), "table")
    with pytest.raises(UserError, match=r"table: 1 sample\(s\) are too few to divide"):
        parts_of(one)
    with pytest.raises(UserError, match="table: has no sample of split test; splits: train 4"):
        parts_of(scenes({"a": 2, "b": 2}, ("train",)))
