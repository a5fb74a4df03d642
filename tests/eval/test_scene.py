"""Scenes from files to the report, with one label and with several."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_support import network, write_csv, write_scenes

from pera_fast.eval import Evaluation, evaluate, kinds
from pera_fast.eval.report import text_table

COUNTS = {"dark": 24, "medium": 24, "bright": 20}
PLAIN = ("accuracy", "macro_f1")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    folder = tmp_path_factory.mktemp("scenes")
    networks = [network(), network(1, "other")]
    data = write_scenes(folder / "data", COUNTS)
    return evaluate("scene", data, networks, folder / "out", labels=(0.2, 1.0), progress=False)


def test_every_network_and_share_has_all_metrics(found: Evaluation) -> None:
    assert [(e.weights, e.share, e.labelled) for e in found.entries] == [
        (name, share, count) for name in ("small", "other") for share, count in ((1.0, 54), (0.2, 11))
    ]
    for entry in found.entries:
        result = entry.result
        assert result.columns == ("accuracy", "macro_f1", "knn20_accuracy", "knn5_accuracy")
        assert len(result.metrics) == 2 * 3 + 2 * 9
        assert result.metrics.keys() == result.intervals.keys()
        for name, (low, high) in result.intervals.items():
            assert 0 <= low <= high <= 1, name
        pooling = result.details["pooling"]
        for name in PLAIN:
            assert result.metrics[name] == result.metrics[f"linear.{pooling['linear']}.{name}"]
            assert result.metrics[f"knn5_{name}"] == result.metrics[f"knn5.{pooling['knn5']}.{name}"]


def test_brightness_is_found_and_the_confusion_matrix_agrees(found: Evaluation) -> None:
    result = found.entries[0].result
    table = np.array(result.details["confusion"])
    assert table.sum() == len(found.parts.test) == 14
    assert table.trace() / table.sum() == pytest.approx(result.metrics["accuracy"])
    assert result.metrics["accuracy"] > 0.7
    assert result.metrics["knn20_accuracy"] > 0.6


def test_report_and_numbers_hold_the_same(found: Evaluation) -> None:
    assert found.report is not None
    assert found.numbers is not None
    page = found.report.read_text(encoding="utf-8")
    assert len(re.findall('src="data:image/png;base64,', page)) == 3, "shares of the labels, two confusion matrices"
    assert not re.search(r'(src|href)="(?!data:)', page), "nothing is loaded from elsewhere"
    told = json.loads(found.numbers.read_text(encoding="utf-8"))
    assert told["task"] == "scene"
    assert told["classes"] == ["bright", "dark", "medium"]
    assert len(told["results"]) == 4
    for entry, row in zip(found.entries, told["results"], strict=True):
        assert row["metrics"] == entry.result.metrics
        assert f"{100 * row['metrics']['accuracy']:.1f}" in page
        assert f"{100 * row['metrics']['accuracy']:.1f}" in text_table(found)
    assert sorted(path.name for path in found.report.parent.iterdir()) == ["report.html", "report.json"]


def test_the_same_again(found: Evaluation) -> None:
    again = evaluate("scene", found.samples, network(), poolings=("both", "cls"), progress=False)
    assert again.report is None
    expected = found.entries[0].result.metrics
    for name, value in again.entries[0].result.metrics.items():
        if ".cls." in name or ".both." in name:
            assert value == expected[name], name
    assert not [name for name in again.entries[0].result.metrics if ".mean." in name]


def test_validation_that_was_given_chooses(tmp_path: Path) -> None:
    data = write_scenes(tmp_path / "data", {"dark": 9, "bright": 9})
    rows = [f"{name}/{n}.png,{name},{('train', 'val', 'test')[n % 3]}" for name in ("dark", "bright") for n in range(9)]
    table = write_csv(tmp_path / "data.csv", "file,class,split", rows)
    found = evaluate("scene", table, network(), root=data, progress=False)
    assert (found.settings["train"], found.settings["val"], found.settings["test"]) == (6, 6, 6)
    assert found.entries[0].labelled == 12


def test_several_labels(tmp_path: Path) -> None:
    """Files of the class folders again, each with the label of its brightness and one of two others."""
    write_scenes(tmp_path / "data", {"dark": 20, "bright": 20})
    rows = [f"{name}/{n}.png,{name}|{('even', 'odd')[n % 2]}" for name in ("dark", "bright") for n in range(20)]
    found = evaluate(
        "scene", write_csv(tmp_path / "data.csv", "file,class", rows), network(), tmp_path / "out", progress=False
    )
    result = found.entries[0].result
    assert result.headline == "mean_average_precision"
    assert result.columns[:3] == ("mean_average_precision", "micro_f1", "macro_f1")
    assert 0.6 < result.metrics["mean_average_precision"] < 1, "brightness is found, the turn of a file is not"
    assert "confusion" not in result.details
    assert found.report is not None
    assert "Average precision of each class" in found.report.read_text(encoding="utf-8")


def test_measures_of_several_labels() -> None:
    kind = kinds.SeveralLabels(("a", "b", "c"))
    targets = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 0]])
    scores = torch.tensor([[2.0, -1, -1], [1, -2, -1], [-1, 3, -1], [-2, 2, 1]])
    counts = np.ones((3, 4), dtype=int)
    found = {name: value for name, (value, _) in kind.measure(targets, scores, 0.0, counts).items()}
    # Class a is ranked right; of b the second is ranked last; c has no sample.
    assert found["mean_average_precision"] == pytest.approx((1 + (1 + 1 + 3 / 4) / 3) / 2)
    assert found["micro_f1"] == pytest.approx(2 * 4 / (5 + 5))
    assert found["macro_f1"] == pytest.approx((1 + 0.8 + 0) / 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_what_the_cpu_finds(found: Evaluation) -> None:
    there = evaluate("scene", found.samples, network(), device="cuda", precision="fp32", progress=False)
    expected = found.entries[0].result.metrics
    for name, value in there.entries[0].result.metrics.items():
        assert abs(value - expected[name]) < 0.15, name
