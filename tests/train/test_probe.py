"""Probes during pretraining: kNN of the teacher on labelled images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from train_support import SMALL, small_config

from pera_fast import pretrain
from pera_fast.errors import UserError
from pera_fast.features.dense import features
from pera_fast.features.images import load_images
from pera_fast.features.knn import knn_accuracy
from pera_fast.model.pera import PerA
from pera_fast.train import probe as probe_module
from pera_fast.train.probe import KEY, Probe, labelled
from pera_fast.weights.files import load_safetensors
from pera_fast.weights.load import load_backbone

CLASSES = {"dark": 60, "light": 190, "mixed": 128}


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of nine images, and a CSV with splits."""
    root, rng = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    lines = ["file,class,split"]
    for name, level in CLASSES.items():
        (root / name).mkdir()
        for number in range(9):
            pixels = (level + rng.integers(-50, 50, (40, 40, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
            lines.append(f"{name}/{number}.png,{name},{('train', 'train', 'val')[number % 3]}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def probed(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("probed") / "run"
    settings = [*SMALL, f"eval.data={scenes / 'labels.csv'}", "eval.every=4"]
    assert pretrain(scenes, out, "tiny", overrides=settings).exit_code == 0
    return out


def test_probed_steps_have_the_accuracy_and_the_run_is_the_same_without(
    scenes: Path, probed: Path, tmp_path: Path
) -> None:
    pytest.importorskip("nvidia.dali")
    pretrain(scenes, tmp_path / "plain", "tiny", overrides=SMALL)
    with_probes, without = rows(probed), rows(tmp_path / "plain")
    assert [row["step"] for row in with_probes if KEY in row] == [4, 6]  # every 4, and the last
    assert not any(KEY in row for row in without)
    for one, other in zip(with_probes, without, strict=True):
        assert {key: one[key] for key in ("step", "loss", "grad_norm", "lr")} == {
            key: other[key] for key in ("step", "loss", "grad_norm", "lr")
        }
    teachers = [load_file(out / "exported" / "teacher.safetensors") for out in (probed, tmp_path / "plain")]
    assert all(torch.equal(value, teachers[1][name]) for name, value in teachers[0].items())
    assert "kNN" in (probed / "train.log").read_text()


def test_the_number_is_that_of_the_exported_teacher(scenes: Path, probed: Path) -> None:
    parts = labelled(small_config(f"eval.data={scenes / 'labels.csv'}"))
    assert parts is not None
    assert [len(part) for part in parts] == [18, 9]
    backbone = load_backbone(probed)
    found = []
    for part in parts:
        pictures = load_images([paths[0] for paths in part.images], backbone.cfg.views.global_size, backbone.cfg)
        rows_ = features(backbone.model, pictures, backbone.cfg.views.mean, backbone.cfg.views.std)[0]
        found += [rows_, torch.tensor([labels[0] for labels in part.labels])]
    assert knn_accuracy(*found) == pytest.approx(rows(probed)[-1][KEY])


def test_the_best_teacher_is_kept(scenes: Path, probed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best, metadata = load_safetensors(probed / "exported" / "best.safetensors")
    numbers = {row["step"]: row[KEY] for row in rows(probed) if KEY in row}
    assert metadata[KEY] == max(numbers.values())
    assert numbers[metadata["step"]] == metadata[KEY]
    assert load_backbone(probed / "exported" / "best.safetensors").width == best["cls_token"].shape[-1]

    cfg = small_config(f"eval.data={scenes / 'labels.csv'}")
    parts, model, path = labelled(cfg), PerA(cfg), tmp_path / "best.safetensors"
    assert parts is not None
    found = iter([0.5, 0.4, 0.7, 0.6, 0.8])
    monkeypatch.setattr(probe_module, "knn_accuracy", lambda *_: next(found))
    probe = Probe(cfg, model, parts, path)
    assert [probe.run(step) for step in (1, 2, 3)] == [0.5, 0.4, 0.7]
    assert load_safetensors(path)[1]["step"] == 3
    again = Probe(cfg, model, parts, path)  # of a resumed run
    assert again.best == 0.7
    again.run(4)
    assert load_safetensors(path)[1]["step"] == 3
    again.run(5)
    assert load_safetensors(path)[1]["step"] == 5


def test_probes_take_a_hundredth_of_the_time(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = small_config(f"eval.data={scenes}")
    parts = labelled(cfg)
    assert parts is not None
    now = [0.0]
    monkeypatch.setattr(probe_module.time, "monotonic", lambda: now[0])
    probe = Probe(cfg, PerA(cfg), parts, tmp_path / "best.safetensors")
    measure = probe_module.knn_accuracy

    def slow(*args: Any) -> float:
        now[0] += 2.0
        return measure(*args)

    monkeypatch.setattr(probe_module, "knn_accuracy", slow)
    probe.begin()
    probes = 0
    for step in range(1, 2001):
        now[0] += 1.0
        if probe.is_due(step):
            probe.run(step)
            probes += 1
    assert probes == 2000 // 200


def test_train_is_divided_where_there_is_no_val(scenes: Path, tmp_path: Path) -> None:
    text = (scenes / "labels.csv").read_text().replace(",val", ",test")
    (tmp_path / "labels.csv").write_text(text)
    parts = labelled(small_config(f"eval.data={tmp_path / 'labels.csv'}", f"eval.root={scenes}"))
    assert parts is not None
    assert [len(part) for part in parts] == [15, 3]  # of the 18 of split train
    assert not set(parts[0].images) & set(parts[1].images)
    few = labelled(small_config(f"eval.data={scenes}", "eval.images=5"))
    assert few is not None
    assert [len(part) for part in few] == [5, 5]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("eval.data=/nowhere.csv", "/nowhere.csv: no such file or folder"),
        ("eval.size=33", "eval.size=33: must be a multiple of model.patch_size=8"),
        ("eval.every=0", "eval.every=0: wants a whole number (at least 1) or null"),
        ("eval.data=s3://labels.csv", "is a URL"),
    ],
)
def test_wrong_settings(scenes: Path, tmp_path: Path, setting: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        pretrain(scenes, tmp_path / "run", "tiny", overrides=[*SMALL, setting])
    assert told in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_image_that_cannot_be_read_ends_it_before_the_first_step(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        for number in range(3):
            (tmp_path / name / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"\.png: cannot be read as an image"):
        pretrain(scenes, tmp_path / "run", "tiny", overrides=[*SMALL, f"eval.data={tmp_path}"])
    assert not (tmp_path / "run").exists()
