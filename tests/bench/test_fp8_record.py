"""The measurement of an FP8 teacher: on a small checkpoint, and what the docs quote of the committed one."""

import json
import sys
from pathlib import Path

import pytest
import torch
from train_support import make_run, small_config

from pera_bench import fp8
from pera_fast.procedural.scenes import write_scenes
from pera_fast.train.checkpoint import save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "bench" / "results" / "fp8" / "demo-cpu.json"


def test_a_checkpoint_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    run = make_run(small_config("model.prototypes=128"), tmp_path / "run")  # of a run in float32
    with torch.no_grad():
        for parameter in run.pera.teacher.parameters():
            parameter.mul_(1.5)
    path = save_checkpoint(tmp_path / "run" / "checkpoints", run.state(), keep=1)
    write_scenes(tmp_path / "images", 1, size=64)
    given = ["--checkpoint", str(path), "--data", str(tmp_path / "images"), "--json", str(tmp_path / "found.json")]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["pera_bench.fp8", *given, "--batches", "2"])
    fp8.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["device"] == "cpu"
    assert found["checkpoint"]["rows"] == 2 * 4 * 4  # batches, images, crops
    assert 0 < found["checkpoint"]["entropy"] < 4.86  # log 128
    half, eight = (found["checkpoint"][name] for name in ("fp32 to bf16", "bf16 to fp8"))
    assert 0 < half["kl_median"] <= half["kl_max"]
    assert half["kl_mean"] < eight["kl_mean"]
    assert half["row_error"] < eight["row_error"] < 0.2
    assert fp8.markdown(found) in capsys.readouterr().out


def test_divergences_are_those_of_the_definition() -> None:
    state = {
        "config": "recipe: tiny\noptim: {teacher_temp: 0.04}\n",
        "model": {
            "center": torch.tensor([[0.1, 0.0, -0.1]]),
            "teacher.cls_head.last_layer.weight_g": torch.ones(3, 1) * 2,
            "teacher.cls_head.last_layer.weight_v": torch.tensor([[3.0, 0.0], [0.0, 5.0], [1.0, 1.0]]),
        },
    }
    logs = fp8.distributions(state)(torch.tensor([[0.6, 0.8]], dtype=torch.float64))
    logits = torch.tensor([[1.2, 1.6, 2 * 1.4 * 0.5**0.5]], dtype=torch.float64) - state["model"]["center"]
    torch.testing.assert_close(logs, (logits / 0.04).log_softmax(1))


def test_the_docs_quote_what_is_committed() -> None:
    text = (ROOT / "docs" / "fp8.md").read_text(encoding="utf-8")
    found = json.loads(COMMITTED.read_text(encoding="utf-8"))
    for table in fp8.markdown(found).strip().split("\n\n"):
        assert table in text
    assert f"{found['date']}, commit {found['commit']}, torch {found['torch']}" in text


def test_what_does_not_go_together_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    for more in ([], ["--work", "a", "--checkpoint", "b"], ["--checkpoint", "b"]):
        monkeypatch.setattr(sys, "argv", ["pera_bench.fp8", "--json", str(tmp_path / "x.json"), *more])
        with pytest.raises(SystemExit):
            fp8.main()
        assert "give --work, or --checkpoint and --data" in capsys.readouterr().err
