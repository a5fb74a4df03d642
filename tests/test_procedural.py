"""Procedural pictures with masks."""

from pathlib import Path

import numpy as np
import pytest

from pera_fast.features.samples import read_samples
from pera_fast.procedural import labelled
from pera_fast.procedural.canvas import Canvas
from pera_fast.procedural.labelled import change_pair, road_scene, write_changes, write_roads


def test_pictures_depend_on_seed_and_index_alone() -> None:
    for make in (road_scene, change_pair):
        one, again, other = make(3, 5, 64), make(3, 5, 64), make(3, 6, 64)
        assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
        assert not np.array_equal(one[0], other[0])
        assert one[0].shape == (64, 64, 3)
        assert one[-1].shape == (64, 64)
        assert set(np.unique(one[-1])) <= {0, 1}


def test_masks_mark_some_of_the_picture() -> None:
    roads = np.mean([road_scene(0, index, 128)[1].mean() for index in range(12)])
    changes = np.mean([change_pair(0, index, 128)[2].mean() for index in range(12)])
    assert 0.05 < roads < 0.35
    assert 0.02 < changes < 0.3


def test_what_the_mask_leaves_out_did_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one light both pictures are equal but for houses and their shadows, which reach two units beyond."""
    monkeypatch.setattr(
        Canvas, "finish", lambda self: (np.clip(self.pixels, 0, 1) * 255).astype(np.uint8), raising=True
    )
    for index in range(6):
        before, after, mask = change_pair(1, index, 128)
        near = np.zeros_like(mask, bool)
        for down in range(-3, 4):
            for right in range(-3, 4):
                near |= np.roll(mask, (down, right), (0, 1)).astype(bool)
        differs = (before != after).any(2)
        inside = np.zeros_like(differs)
        inside[4:-4, 4:-4] = True  # np.roll wraps around
        assert not (differs & ~near & inside).any()
        assert differs[mask.astype(bool)].mean() > 0.6  # a house may stand before another


def test_written_sets_are_read_as_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for task, write in (("segmentation", write_roads), ("change", write_changes)):
        table = write(tmp_path / task, 3, 2, size=32)
        samples = read_samples(task, table)
        assert [len(samples.part("train")), len(samples.part("test"))] == [3, 2]
        assert len(samples.images[0]) == (1 if task == "segmentation" else 2)
    monkeypatch.setattr(labelled, "road_scene", None)  # what is there is not made again
    assert write_roads(tmp_path / "segmentation", 3, 2, size=32).is_file()
