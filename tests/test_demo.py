"""The demo: scenes, and a short run that ends with a whole report."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from kept_workers import kept_workers  # noqa: F401 a fixture

from pera_fast.demo import run as demo
from pera_fast.demo.figures import _components, running_mean
from pera_fast.demo.found import Compared, DemoResult, verdict
from pera_fast.demo.run import run
from pera_fast.errors import UserError
from pera_fast.procedural.labelled import write_roads
from pera_fast.procedural.scenes import CLASSES, scene, write_scenes

QUICK = ("train.batch_size=4", "model.depth=2", "model.embed_dim=48", "model.head_hidden=64", "model.prototypes=64")


def test_scenes_are_keyed() -> None:
    for label in range(len(CLASSES)):
        first = scene(0, label, 5, size=64)
        assert first.shape == (64, 64, 3)
        assert first.dtype == np.uint8
        assert np.array_equal(first, scene(0, label, 5, size=64))
        assert not np.array_equal(first, scene(0, label, 6, size=64))
        assert not np.array_equal(first, scene(1, label, 5, size=64))
        assert first.std() > 3, "something can be seen"


def test_mean_colour_does_not_give_the_class_away() -> None:
    colours = np.array([[scene(0, label, i, 64).mean((0, 1)) for i in range(12)] for label in range(len(CLASSES))])
    within = colours.std(axis=1).mean()
    between = colours.mean(axis=1).std(axis=0).mean()
    assert between < 2.5 * within


def test_written_scenes_are_left_alone(tmp_path: Path) -> None:
    written = write_scenes(tmp_path, 1, size=32)
    assert len(written) == len(CLASSES)
    before = {path: path.stat().st_mtime_ns for path in written}
    assert {path: path.stat().st_mtime_ns for path in write_scenes(tmp_path, 1, size=32)} == before


@pytest.mark.slow
def test_report_has_all_its_parts(tmp_path: Path) -> None:
    found = run(tmp_path / "demo", steps=3, scenes=(3, 2), pairs=(3, 2), overrides=QUICK)
    page = found.report.read_text(encoding="utf-8")
    for title in ("disjoint masks", "Loss", "random against pretrained", "PCA maps", "Numbers", "Roads:", "Changes:"):
        assert title in page
    assert len(re.findall(r'src="data:image/png;base64,', page)) >= 6
    assert not re.search(r'(src|href)="(?!data:)', page), "nothing is loaded from elsewhere"
    assert [one.task for one in found.compared] == ["scene", "segmentation", "change"]
    for one in found.compared:
        assert one.report.is_file()
        assert f"{one.after:.1%}" in page
    demo._claim(tmp_path / "demo")  # as the next demo does
    left = sorted(path.name for path in (tmp_path / "demo").iterdir())
    assert left == [demo.MARK, "changes-0-3-2", "report.html", "roads-0-3-2", "scenes-0-3-2"]


@pytest.mark.slow
def test_own_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pera_fast.demo.run.MOST", 20)
    images = tmp_path / "images"
    write_scenes(images, 5, size=96)
    found = run(tmp_path / "labelled", data=images, steps=2, pairs=(2, 2), overrides=QUICK)
    page = found.report.read_text(encoding="utf-8")
    assert "32 to pretrain on, 8 held out" in page
    assert len(list((tmp_path / "labelled" / "train").rglob("*.jpg"))) == 32
    report = json.loads((found.compared[0].report.parent / "report.json").read_text())
    assert (report["train"], report["test"]) == (20, 8)
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in sorted(images.rglob("*.jpg"))[:8]:
        path.rename(flat / path.name)
    unlabelled = demo._given(flat, tmp_path / "unlabelled", seed=0)
    assert (unlabelled.folder, unlabelled.samples) == (flat, {})
    assert "no labels, so no evaluation of scenes" in unlabelled.note


def test_tables_beside_the_images_are_used(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", 3, size=32)
    rows = [f"{name}/{name}_{i:04d}.jpg,{name},{'test' if i == 2 else 'train'}" for name in CLASSES for i in range(3)]
    (tmp_path / "scenes.csv").write_text("\n".join(["file,class,split", *rows]) + "\n")
    roads = write_roads(tmp_path / "roads", 2, 1, size=32)
    roads.rename(tmp_path / "roads.csv")
    images = demo._given(tmp_path, tmp_path / "out", seed=0)
    assert sorted(images.samples) == ["scene", "segmentation"]
    assert len(images.samples["scene"].part("test")) == len(CLASSES)
    assert images.samples["segmentation"].source.endswith("roads.csv")
    assert len(list(images.folder.rglob("*.jpg"))) == 2 * len(CLASSES)


def test_other_folders_are_not_cleared(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="not empty"):
        run(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep me"


@pytest.mark.parametrize(
    ("last", "after", "words"), [(1.0, 0.5, ("fell", "rose")), (3.0, 0.2, ("did not fall", "did not rise"))]
)
def test_verdict_is_plain(last: float, after: float, words: tuple[str, str]) -> None:
    compared = Compared("segmentation", "miou", 0.3, after, None, Path("e.html"))
    text = verdict(DemoResult(Path("r.html"), 2.0, last, (compared,), "note", 1.0))
    assert all(f" {word} " in text for word in words)
    assert "mIoU of roads" in text


def test_maps_show_the_parts_of_each_image() -> None:
    """Images whose features lie far apart, each with a left and a right half that differ a little."""
    generator = torch.Generator().manual_seed(0)
    halves = (torch.arange(64) % 8 >= 4).float()[None, :, None] * torch.randn(6, 1, 16, generator=generator)
    own = 40 * torch.randn(6, 1, 16, generator=generator) + 0.05 * torch.randn(6, 64, 16, generator=generator)
    maps = _components(own + halves)
    assert maps.shape == (6, 8, 8, 3)
    first = maps[..., 0]
    assert (np.abs(first[:, :, 4:].mean((1, 2)) - first[:, :, :4].mean((1, 2))) > 0.7).all()


def test_running_mean() -> None:
    assert np.allclose(running_mean(np.full(50, 3.0)), 3.0)
    assert np.allclose(running_mean(np.arange(100.0))[20:80], np.arange(100.0)[20:80])
