"""Runs of fine-tuning: learning, resuming to the bit, signals, what is kept, and wrong inputs."""

import json
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from finetune_support import SHORT, masks, scenes, small_config, small_weights, write_csv

from pera_fast import cli, pretrain
from pera_fast.errors import UserError
from pera_fast.finetune import loop
from pera_fast.finetune.api import finetune
from pera_fast.finetune.predict import predict
from pera_fast.finetune.tuned import load_tuned
from pera_fast.run_result import RunResult
from pera_fast.train.checkpoint import find_checkpoints, load_checkpoint
from pera_fast.weights.load import load_backbone

FEW = [*SHORT, "train.batch_size=2", "train.epochs=2", "model.drop_path=0.3", "finetune.dice=1"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_weights(tmp_path_factory.mktemp("weights") / "w.safetensors")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture(scope="module")
def rectangles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return masks(tmp_path_factory.mktemp("data") / "masks")


@pytest.fixture(scope="module")
def learned(weights: Path, classes: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    out = tmp_path_factory.mktemp("runs") / "run"
    return finetune("scene", classes, out, weights, overrides=[*SHORT, "train.epochs=6", "optim.lr=3e-3"])


def _rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_leaves_a_run_folder(learned: RunResult) -> None:
    assert (learned.exit_code, learned.steps) == (0, 12)
    rows = _rows(learned.out)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    validated = [row for row in rows if "val_accuracy" in row]
    assert [row["epoch"] for row in validated] == list(range(6))
    assert validated[-1]["val_accuracy"] == 1
    assert "samples to train, 2 to validate, 0 to test on" in (learned.out / "train.log").read_text()
    assert (learned.out / "config.yaml").read_text().count("task: scene") == 1
    assert list(learned.out.glob("events.out.tfevents.*"))


def test_the_run_is_weights_for_everything(learned: RunResult, weights: Path) -> None:
    model, cfg = load_tuned(learned.out, torch.device("cpu"))
    backbone = load_backbone(learned.out)
    assert model.plan.classes == ("dark", "light")
    assert (cfg.model, cfg.views.mean) == (backbone.cfg.model, small_config().views.mean)
    before = load_backbone(weights).model.state_dict()
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, model.backbone.state_dict()[name])
    assert not torch.equal(backbone.model.cls_token, before["cls_token"])
    checkpoint = load_backbone(find_checkpoints(learned.out / "checkpoints")[-1])
    assert checkpoint.width == 16


def test_the_weights_alone_are_not_fine_tuned(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no head, only a backbone; train one: pera-fast finetune"):
        load_tuned(weights, torch.device("cpu"))
    with pytest.raises(UserError, match=r"no run of `pera-fast finetune`, nor its exported/model.safetensors"):
        load_tuned(tmp_path, torch.device("cpu"))


def _stopping(monkeypatch: pytest.MonkeyPatch, at: int, number: signal.Signals) -> None:
    """A signal arrives during a step."""
    step = loop._step

    def stopped(run: loop.Tuning, batches):
        metrics = step(run, batches)
        if run.step == at:
            signal.raise_signal(number)
        return metrics

    monkeypatch.setattr(loop, "_step", stopped)


@pytest.mark.parametrize(("number", "at"), [(signal.SIGINT, 2), (signal.SIGTERM, 3)])
def test_a_resumed_run_is_equal_to_the_bit(
    number: signal.Signals, at: int, weights: Path, rectangles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finetune("segmentation", rectangles, tmp_path / "whole", weights, overrides=FEW)
    assert whole.steps == 6  # of two epochs: stopped within the first one, or at its end before its validation
    with monkeypatch.context() as patch:
        _stopping(patch, at, number)
        stopped = finetune("segmentation", rectangles, tmp_path / "cut", weights, overrides=FEW)
    assert (stopped.exit_code, stopped.steps) == (128 + number, at)
    again = finetune("segmentation", rectangles, tmp_path / "cut", resume=True)
    assert (again.exit_code, again.steps) == (0, whole.steps)
    first, second = (
        load_checkpoint(find_checkpoints(tmp_path / name / "checkpoints")[-1]) for name in ("whole", "cut")
    )
    assert first["model"].keys() == second["model"].keys()
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    assert first["finetune"] == second["finetune"]
    drop = ("seconds", "images_per_s", "data_wait", "mem", "val_seconds")
    rows = [[{k: v for k, v in row.items() if k not in drop} for row in _rows(tmp_path / n)] for n in ("whole", "cut")]
    assert rows[0] == rows[1]
    exported = [(tmp_path / name / "exported" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert exported[0] == exported[1]


def test_resume_auto_starts_goes_on_and_refuses_other_settings(weights: Path, classes: Path, tmp_path: Path) -> None:
    def run(*more: str) -> RunResult:
        return finetune("scene", classes, tmp_path / "run", weights, resume="auto", overrides=[*SHORT, *more])

    assert run("train.steps=2", "finetune.val_share=0").steps == 2
    assert run("train.steps=2", "finetune.val_share=0").metrics == {}
    with pytest.raises(UserError, match=r"holds a run with other settings: optim.lr=0.1 \(was 0.0005\)"):
        run("train.steps=2", "finetune.val_share=0", "optim.lr=0.1")
    with pytest.raises(UserError, match="holds a run already; continue it with --resume"):
        finetune("scene", classes, tmp_path / "run", weights)
    with pytest.raises(UserError, match=r"cannot be continued with finetune.head=mlp"):
        finetune("scene", classes, tmp_path / "run", resume=True, overrides=["finetune.head=mlp"])
    with pytest.raises(UserError, match="is of `pera-fast finetune`; resume it with that command"):
        pretrain(classes, tmp_path / "run", resume=True)
    assert finetune("scene", classes, tmp_path / "run", resume=True, overrides=["train.steps=3"]).steps == 3


def test_a_damaged_checkpoint_is_named(weights: Path, classes: Path, tmp_path: Path) -> None:
    settings = [*SHORT, "train.steps=3", "train.checkpoint_every=1", "finetune.val_share=0"]
    finetune("scene", classes, tmp_path / "run", weights, overrides=settings)
    *_, older, newest = find_checkpoints(tmp_path / "run" / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"damaged checkpoint .*delete it to resume from {older.name}"):
        finetune("scene", classes, tmp_path / "run", resume=True)
    newest.unlink()
    assert finetune("scene", classes, tmp_path / "run", resume=True).steps == 3


def test_patience_ends_a_run_and_the_best_network_is_kept(
    weights: Path, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([0.5, 0.7, 0.6, 0.7, 0.9, 0.1, 0.2, 0.3])
    seen = []

    def validate(model, data, batch_size, overlap):
        seen.append(model.head.out.weight.detach().clone())
        return {"accuracy": next(found)}

    monkeypatch.setattr(loop, "validate", validate)
    settings = [*SHORT, "train.epochs=9", "finetune.patience=2", "optim.lr=1e-2"]
    result = finetune("scene", classes, tmp_path / "run", weights, overrides=settings)
    assert (result.exit_code, result.steps) == (0, 4 * 2)
    model, _ = load_tuned(tmp_path / "run", torch.device("cpu"))
    assert torch.equal(model.head.out.weight, seen[1])
    assert (
        "no better accuracy in 2 validations (finetune.patience): done" in (tmp_path / "run" / "train.log").read_text()
    )
    more = finetune("scene", classes, tmp_path / "run", resume=True, overrides=["finetune.patience=3"])
    assert more.steps == 8 * 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(precision: str, weights: Path, tmp_path: Path) -> None:
    data = masks(tmp_path / "pairs", count=4, pairs=True)
    settings = [*SHORT, f"train.precision={precision}", "train.steps=3", "finetune.head=uper", "train.batch_size=2"]
    result = finetune("change", data, tmp_path / "run", weights, overrides=settings)
    assert result.steps == 3
    assert np.isfinite(result.metrics["loss"])
    assert ("loss_scale" in result.metrics) == (precision == "fp16")


def test_splits_labels_and_several_classes(weights: Path, classes: Path, tmp_path: Path) -> None:
    names = [f"{name}/{number}.png" for name in ("dark", "light") for number in range(6)]
    splits = ["train", "train", "train", "val", "test", "test"] * 2
    labels = ["night", "night|water", "water", "night", "night", "water"] * 2
    rows = list(zip(names, labels, splits, strict=True))
    data = write_csv(tmp_path / "set.csv", [("file", "class", "split"), *rows])
    settings = [*SHORT, "train.steps=2", "finetune.labels=0.5"]
    result = finetune("scene", data, tmp_path / "run", weights, root=classes, overrides=settings)
    told = (result.out / "train.log").read_text()
    assert "3 samples to train, 2 to validate, 4 to test on" in told
    assert "fewer samples than train.batch_size=4: a step takes 3" in told
    test = json.loads((result.out / "test.json").read_text())
    assert test["samples"] == 4
    assert {"f1", "macro_f1"} < test.keys()
    (result.out / "test.json").unlink()  # killed before it was written
    again = finetune("scene", data, result.out, root=classes, resume=True)
    assert (again.metrics, json.loads((result.out / "test.json").read_text())) == ({}, test)
    model, _ = load_tuned(result.out, torch.device("cpu"))
    assert model.plan.several


def test_twelve_bands_and_ranges_of_the_weights_without_a_key(tmp_path: Path) -> None:
    ranges = f"[{','.join(f'[0,{1000 + 100 * band}]' for band in range(12))}]"
    bands = f"[{','.join(str(band) for band in range(1, 13))}]"
    given = [f"data.bands={bands}", f"data.band_range={ranges}", "data.depth=16"]
    weights = small_weights(tmp_path / "w.safetensors", given)
    rng = np.random.default_rng(0)
    for name, high in (("low", 500), ("high", 1500)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(6):
            with rasterio.open(
                tmp_path / "set" / name / f"{number}.tif",
                "w",
                driver="GTiff",
                count=12,
                height=64,
                width=64,
                dtype="uint16",
            ) as file:
                file.write(rng.integers(0, high, (12, 64, 64), dtype=np.uint16))
    result = finetune("scene", tmp_path / "set", tmp_path / "run", weights, overrides=[*SHORT, "train.steps=2"])
    cfg = load_backbone(result.out).cfg
    assert (len(cfg.data.bands or []), cfg.data.depth, (cfg.data.band_range or [])[11]) == (12, "16", [0, 2100])
    assert predict(result.out, tmp_path / "set", tmp_path / "out").written == 12
    rgb = scenes(tmp_path / "rgb", count=4)
    with pytest.raises(UserError, match=r"none of the 4 input\(s\) .* could be read"):
        predict(result.out, rgb, tmp_path / "none")


def _line(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.run(["finetune", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error.removeprefix("error: ").strip()


def test_wrong_calls_get_one_line(
    weights: Path, classes: Path, rectangles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(task: str, data: Path, *more: str) -> str:
        return _line(["--task", task, "--data", str(data), "--out", str(tmp_path / "out"), *more], capsys)

    told = line("scene", classes)
    assert told.startswith("--weights is missing: give a run, a file of weights")
    w = ["--weights", str(weights)]
    assert "--task seg: no such task" in line("seg", classes, *w)
    assert "no run to resume there" in line("scene", classes, "--resume")
    assert "lies in the folder of images" in _line(
        ["--task", "scene", "--data", str(classes), "--out", str(classes / "out"), *w], capsys
    )
    assert line("scene", classes, *w, "--ignore", "3") == (
        "finetune.ignore=3: is for masks, and --task is scene; leave it out"
    )
    assert "has the value 1, and the classes are" in line(
        "segmentation", rectangles, *w, "--ignore", "0", "--classes", "road"
    )
    assert not (tmp_path / "out").exists()


def test_torchrun_is_refused(weights: Path, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="trains in one process, on one device; start it without torchrun"):
        finetune("scene", classes, tmp_path / "out", weights)
