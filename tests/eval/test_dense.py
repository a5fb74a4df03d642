"""Segmentation and change on tiny images: tiles, folds, heads, scores, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_support import network, write_changes, write_masks
from PIL import Image

from pera_fast import cli
from pera_fast.errors import UserError
from pera_fast.eval import evaluate, heads
from pera_fast.eval.dense import Dense, network_size, prepare, spread_layers
from pera_fast.eval.pieces import Pieces
from pera_fast.eval.task import Options, with_masks
from pera_fast.features.extract import Extractor
from pera_fast.features.masks import IGNORED
from pera_fast.features.samples import read_samples
from pera_fast.features.tiles import TileGrid

CPU = torch.device("cpu")
MESSAGES = (Path(__file__).parents[2] / "docs" / "messages.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def roads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_masks(tmp_path_factory.mktemp("roads"), 9, ignored=255)


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_changes(tmp_path_factory.mktemp("changes"), 9)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, schedule in heads.SCHEDULES.items():
        monkeypatch.setitem(heads.SCHEDULES, name, replace(schedule, epochs=1, steps=30, lr=3e-2))


def prepared(data: Path, task: str, memory: int | None = None, **options) -> Dense:
    chosen = Options(progress=False, **options)
    parts = with_masks(read_samples(task, data), chosen)
    dense = prepare(parts, Extractor(network(), CPU), chosen)
    if memory is None:
        return dense
    pieces = dense.pieces
    again = Pieces(pieces.samples, pieces.masks, pieces.extractor, pieces.layers, pieces.size // 4, False, memory)
    return replace(dense, pieces=again)


@pytest.mark.parametrize("head", ["linear", "conv"])
@pytest.mark.parametrize("task", ["segmentation", "change"])
def test_bright_rectangles_are_found(task: str, head: str, roads: Path, changes: Path, short: None) -> None:
    data, ignore = (roads, 255) if task == "segmentation" else (changes, None)
    found = evaluate(task, data, network(), head=head, ignore=ignore, device="cpu", progress=False)
    (entry,) = found.entries
    metrics = entry.result.metrics
    assert metrics[entry.result.headline] > 0.6
    low, high = entry.result.intervals[entry.result.headline]
    assert low <= metrics[entry.result.headline] <= high
    table = np.array(entry.result.details["confusion"])
    assert table.sum() == 3 * (24 * 24 - (3 * 24 if task == "segmentation" else 0))  # ignored pixels are not counted
    assert found.classes == (("0", "1") if task == "segmentation" else ("unchanged", "changed"))
    if task == "change":
        share = table[1].sum() / table.sum()
        assert metrics["all_changed_f1"] == pytest.approx(2 * share / (share + 1))


def test_folds_measure_every_sample_once_and_learn_from_none_of_a_fold(changes: Path, short: None) -> None:
    dense = prepared(changes, "change", folds=3)
    splits = dense.splits(1.0)
    assert sorted(row for split in splits for row in split.test) == list(range(9))
    assert all(sorted([*split.labelled, *split.test]) == list(range(9)) for split in splits)
    assert all(split.val for split in splits)
    smaller = dense.splits(0.5)
    assert all(set(a.labelled) < set(b.labelled) and a.test == b.test for a, b in zip(smaller, splits, strict=True))
    result = evaluate("change", changes, network(), folds=3, device="cpu", progress=False).entries[0].result
    assert np.array(result.details["confusion"]).sum() == 9 * 24 * 24
    assert len(result.details["thresholds"]) == 3


def test_features_that_do_not_fit_are_extracted_again_and_are_the_same(roads: Path) -> None:
    kept, other = (prepared(roads, "segmentation", memory, ignore=255, size=16) for memory in (1 << 30, 0))
    assert kept.pieces.all_kept
    assert not other.pieces.all_kept
    numbers = [0, 5, 17]
    for a, b in zip(kept.pieces.batch(numbers), other.pieces.batch(numbers), strict=True):
        torch.testing.assert_close(a, b.half().to(a.dtype), rtol=1e-2, atol=1e-3)
    rows = range(3)
    both = zip(kept.pieces.scenes(rows), other.pieces.scenes(rows), strict=True)
    for (row, mask, some), (again, same, others) in both:
        assert row == again
        assert (mask == same).all()
        torch.testing.assert_close(torch.cat(list(some)), torch.cat(list(others)), rtol=1e-2, atol=1e-3)
    order = other.pieces.order([2, 0], np.random.default_rng(0))
    assert sorted(order) == sorted([*kept.pieces.numbers[0], *kept.pieces.numbers[2]])
    tiles = len(kept.pieces.numbers[0])
    assert len({number // tiles for number in order[:tiles]}) == 1  # a sample's tiles stay together: it is read once


def test_features_of_a_tile_are_those_of_its_pixels_and_its_target_that_of_its_mask(roads: Path) -> None:
    pieces = prepared(roads, "segmentation", ignore=255, size=16).pieces
    grid = pieces.grids[1]
    assert grid == TileGrid(24, 24, 16, 4)
    place = 2  # the second row of tiles
    (features,), (target,) = pieces.batch([pieces.numbers[1].start + place])
    tile = grid[place]
    image = pieces.images(1)[0][tile.top : tile.top + 16, tile.left : tile.left + 16]
    patches = pieces.extractor.tokens(torch.from_numpy(image.copy())[None])[0][1]
    torch.testing.assert_close(features, patches[0].t().reshape(32, 2, 2), rtol=1e-2, atol=1e-3)
    mask = pieces.masks.read(pieces.samples.masks[1])[tile.top : tile.top + 16, tile.left : tile.left + 16]
    assert target.tolist() == mask.tolist()


def test_an_image_below_the_size_is_padded_and_the_padding_is_ignored(roads: Path) -> None:
    pieces = prepared(roads, "segmentation", ignore=255, size=32).pieces
    (target,) = pieces.batch([0])[1]
    assert (target[24:] == IGNORED).all()
    assert (target[:, 24:] == IGNORED).all()
    assert (target[3:24, :24] != IGNORED).all()


def test_change_is_the_difference_of_two_images(changes: Path) -> None:
    pieces = prepared(changes, "change", size=24).pieces
    (found,), _ = pieces.batch([4])
    before, after = (pieces.extractor.tokens(torch.from_numpy(image.copy())[None])[0][1] for image in pieces.images(4))
    torch.testing.assert_close(found, (before - after).abs()[0].t().reshape(32, 3, 3), rtol=1e-2, atol=2e-3)


def test_the_same_seed_gives_the_same_head_and_another_seed_another(roads: Path, short: None) -> None:
    dense = prepared(roads, "segmentation", ignore=255)
    one, same, other = (dense.fit([0, 1, 2], seed)[1].weight for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_ignored_pixels_do_not_teach(roads: Path, short: None) -> None:
    head = heads.new_head("linear", 4, 2, 0)
    before = head[1].weight.clone()

    def batch(numbers):
        return torch.randn(len(numbers), 4, 3, 3), torch.full((len(numbers), 6, 6), IGNORED)

    schedule = heads.Schedule(1, 3, 1e-2, 0.0)
    heads.train_head(head, batch, lambda rng: list(range(8)), schedule, 0)
    assert torch.equal(head[1].weight, before)
    assert not head.training


@pytest.mark.parametrize(
    ("side", "patch", "trained", "size"),
    [(96, 8, 96, 96), (97, 8, 96, 104), (192, 8, 96, 192), (400, 8, 96, 160), (256, 8, 96, 152), (5, 16, 224, 16)],
)
def test_network_size_is_the_smallest_that_its_tiles_cover_the_image_with(
    side: int, patch: int, trained: int, size: int
) -> None:
    assert network_size(side, patch, trained) == size
    grid = TileGrid(side, side, size, size // 4)
    smaller = TileGrid(side, side, size - patch, (size - patch) // 4) if size > patch else None
    assert smaller is None or len(smaller) > len(grid)


def test_layers_are_evenly_spread_and_end_with_the_last() -> None:
    assert spread_layers(12, 4) == [2, 5, 8, 11]
    assert spread_layers(4, 4) == [0, 1, 2, 3]
    assert spread_layers(2, 4) == [0, 1]
    assert spread_layers(24, 1) == [23]


def test_report_and_numbers_of_the_command(
    roads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], short: None
) -> None:
    arguments = ["eval", "--task", "segmentation", "--data", str(roads), "--weights", "random:tiny", "--size", "16"]
    arguments += ["--ignore", "255", "--classes", "ground,roof", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert cli.run(arguments) == 0
    out = capsys.readouterr().out
    assert "mIoU, %" in out
    assert "IoU, roof, %" in out
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())
    assert numbers["classes"] == ["ground", "roof"]
    assert numbers["results"][0]["details"]["size"] == 16
    report = (tmp_path / "out" / "report.html").read_text()
    assert "Predictions" in report
    assert report.count("data:image/png;base64") == 1


def test_wrong_input_gets_the_line_of_the_docs(roads: Path, changes: Path, tmp_path: Path) -> None:
    def told(task: str, data: Path, **options) -> str:
        with pytest.raises(UserError) as error:
            evaluate(task, data, network(), device="cpu", progress=False, **options)
        line = str(error.value).replace(str(data.parent), "D")
        assert line.partition(": ")[2] in MESSAGES, line
        return line

    assert told("segmentation", roads).startswith("D/masks/0.png: has the value 255 beside 0, 1; give --ignore 255")
    assert told("segmentation", roads, head="lin").startswith("--head lin: wants one of linear, conv")
    assert told("segmentation", roads, ignore=255, classes=["ground"]).startswith("D/masks/0.png: has the value 1")
    assert told("change", changes, folds=10) == "--folds 10: wants 2 to 9, the number of samples"
    assert told("change", changes, size=20).startswith("--size 20: must be a multiple of the patch size 8")
    assert told("scene", roads, folds=2).endswith("leave them out for --task scene")
    small = write_masks(tmp_path / "small", 3)
    Image.new("L", (20, 24)).save(small.parent / "masks" / "1.png")
    assert told("segmentation", small).startswith("D/masks/1.png: is 20 x 24 px, and its image D/images/1.png is 24")
    pairs = write_changes(tmp_path / "pairs", 3)
    Image.fromarray(np.full((24, 24), 2, np.uint8)).save(pairs.parent / "mask" / "2.png")
    assert told("change", pairs).startswith("D/mask/2.png: has class 2, which no training mask has")
    Image.fromarray(np.full((24, 24), 2, np.uint8)).save(pairs.parent / "mask" / "0.png")
    assert told("change", pairs).startswith("D/set.csv: its masks have 3 classes (0, 1, 2); --task change wants two")
    pairs = write_changes(tmp_path / "pairs", 3)
    Image.new("RGB", (20, 24)).save(pairs.parent / "after" / "0.png")
    assert told("change", pairs).startswith("D/after/0.png: is 20 x 24 px, and D/before/0.png, of the same place")
