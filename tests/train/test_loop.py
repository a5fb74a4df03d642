"""The loop on a small network: exact resuming, accumulation, precisions, non-finite steps, stopping, full disks."""

import errno
import json
import logging
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from train_support import EXACT, make_run, small_config

from pera_fast.errors import UserError
from pera_fast.train import checkpoint, loop
from pera_fast.train.checkpoint import find_checkpoints, load_newest
from pera_fast.train.loop import Run, fit
from pera_fast.train.metrics import KEYS
from pera_fast.train.signals import StopRequest

MEASURED = {"seconds", "images_per_s", "data_wait", "mem", "mfu"}  # of the machine, not of the method


def read_metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def computed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


class Tampered(nn.Module):
    """Calls the model and then does something to its output at some of the calls (counted from 1)."""

    def __init__(self, run: Run, change):
        super().__init__()
        self.pera, self.change, self.calls = run.pera, change, 0
        run.model = self

    def forward(self, inputs: Any, teacher_temp: float) -> dict[str, torch.Tensor]:
        self.calls += 1
        out = self.pera(inputs, teacher_temp)
        self.change(self.calls, out)
        return out


def stop_after(run: Run, step: int, number: int = signal.SIGTERM) -> StopRequest:
    """A request that comes while the step before `step` steps are done is computed."""
    stop = StopRequest()

    def change(call: int, out: Any) -> None:
        if call == step * run.plan.accumulate:
            stop.signal = number

    Tampered(run, change)
    return stop


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_stopped_and_resumed_is_the_run_that_was_not(tmp_path: Path, precision: str):
    cfg = small_config(f"train.precision={precision}", "train.accumulate=2", "train.batch_size=2", "train.steps=5")
    whole = make_run(cfg, tmp_path / "whole")
    assert fit(whole, StopRequest())[0] == 0
    assert whole.pera.compute_dtype == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert all(p.dtype == torch.float32 for p in whole.pera.parameters())

    first = make_run(cfg, tmp_path / "parts")
    assert fit(first, stop_after(first, 3))[0] == 143
    found = load_newest(first.folder.checkpoints)
    assert found is not None
    assert found[1]["step"] == 3
    second = make_run(cfg, tmp_path / "parts", state=found[1])
    assert fit(second, StopRequest())[0] == 0

    rows = computed(read_metrics(tmp_path / "whole"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert computed(read_metrics(tmp_path / "parts")) == rows  # bit for bit: JSON writes floats exactly
    assert any(row["loss"] is not None for row in rows)
    for (name, a), b in zip(whole.pera.state_dict().items(), second.pera.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert (whole.nonfinite, whole.scaler.state_dict()) == (second.nonfinite, second.scaler.state_dict())


def test_accumulation_is_the_larger_batch(tmp_path: Path):
    """Two micro-batches of 2 give the step of one batch of 4, center and EMA included."""
    runs = []
    for batch, accumulate in ((4, 1), (2, 2)):
        cfg = small_config(*EXACT, "optim.lr=0.001", f"train.batch_size={batch}", f"train.accumulate={accumulate}")
        runs.append(make_run(cfg, tmp_path / str(batch)))
        fit(runs[-1], StopRequest())
    rows = [read_metrics(tmp_path / name) for name in ("4", "2")]
    for one, two in zip(*rows, strict=True):
        for key in ("loss", "global_cls_loss", "local_cls_loss", "pixel_loss", "grad_norm"):
            assert one[key] == pytest.approx(two[key], rel=2e-4), (one["step"], key)
    assert rows[0][0]["loss"] == pytest.approx(rows[1][0]["loss"], rel=1e-6)
    one, two = (run.pera for run in runs)
    assert torch.allclose(one.center, two.center, rtol=1e-3, atol=1e-6)
    assert one.center.abs().max() > 1e-4


def test_metrics_of_a_step(tmp_path: Path):
    run = make_run(small_config(), tmp_path)
    _, last = fit(run, StopRequest())
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows] == [0, 0, 0, 1, 1, 1]  # 12 images, 4 a step
    assert set(rows[0]) == set(KEYS)
    assert rows[-1] == last
    assert rows[0]["mfu"] is None  # nobody publishes this CPU's peak
    assert 0 <= rows[0]["data_wait"] <= 1
    assert rows[0]["mem"] > 10
    assert list(tmp_path.glob("events.out.tfevents.*"))
    for row, values in zip(rows, map(run.schedules.at, range(6)), strict=True):
        got = (row["lr"], row["wd"], row["momentum"], row["teacher_temp"])
        assert got == (values.lr, values.weight_decay, values.momentum, values.teacher_temp)


def test_total_is_the_weighted_sum_of_its_parts(tmp_path: Path):
    cfg = small_config("train.steps=2")
    fit(make_run(cfg, tmp_path), StopRequest())
    for row in read_metrics(tmp_path):
        koleo, pixel = row["koleo_loss"] * cfg.views.num_global, row["pixel_loss"] * 100 * cfg.views.num_global
        total = row["global_cls_loss"] + row["local_cls_loss"] + cfg.loss.koleo_weight * koleo
        assert row["loss"] == pytest.approx(total + cfg.loss.pixel_weight * pixel, rel=1e-6)


def snapshot(run: Run) -> list[torch.Tensor]:
    moments = [x for state in run.optimizer.state.values() for x in state.values()]
    return [x.detach().clone() for x in (*run.pera.state_dict().values(), *moments)]


@pytest.mark.parametrize("what", ["loss", "koleo_loss", "teacher_mean", "gradients"])
def test_nonfinite_step_changes_nothing(tmp_path: Path, what: str, caplog):
    run = make_run(small_config("train.steps=4", "train.max_nonfinite=2"), tmp_path)
    before: list[torch.Tensor] = []

    def poison(call: int, out: dict[str, torch.Tensor]) -> None:
        if call != 3:
            return
        before.extend(snapshot(run))
        if what == "gradients":
            out["loss"].register_hook(lambda grad: grad * math.inf)
        else:
            out[what] = out[what] * math.nan

    model = Tampered(run, poison)
    original = loop.launch_step
    after: list[torch.Tensor] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if model.calls == 3:
            after.extend(snapshot(run))
        return result

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO, "pera_fast"):
        patch.setattr(loop, "launch_step", watched)
        assert fit(run, StopRequest())[0] == 0
    assert len(before) == len(after) > 50
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    rows = read_metrics(tmp_path)
    assert [row.get("nonfinite") for row in rows] == [None, None, [what], None]
    if what in rows[2]:
        assert rows[2][what] is None  # JSON has no NaN
    assert f"step 3 skipped: not finite: {what} (1 in a row, 1 in all)" in caplog.text
    assert run.nonfinite == {"total": 1, "row": 0}
    assert not all(torch.equal(a, b) for a, b in zip(after, snapshot(run), strict=True))  # step 4 learns again


def test_nonfinite_steps_in_a_row_end_the_run(tmp_path: Path):
    cfg = small_config("train.max_nonfinite=2", "train.steps=9")
    run = make_run(cfg, tmp_path)

    def poison(call: int, out: dict[str, torch.Tensor]) -> None:
        if call in (3, 5, 6):  # 3 stands alone
            out["pixel_loss"] = out["pixel_loss"] * math.nan

    Tampered(run, poison)
    with pytest.raises(UserError) as error:
        fit(run, StopRequest())
    message = str(error.value)
    assert "step 6: pixel_loss not finite in 2 steps in a row (train.max_nonfinite=2)" in message
    assert "\n" not in message
    assert [path.name for path in find_checkpoints(run.folder.checkpoints)] == ["step_00000002.pt", "step_00000004.pt"]
    found = load_newest(run.folder.checkpoints)
    assert found is not None
    assert found[1]["nonfinite"] == {"total": 1, "row": 0}


def test_fp16_overflow_lowers_the_scale_and_is_no_failure(tmp_path: Path):
    run = make_run(small_config("train.precision=fp16", "train.max_nonfinite=1", "train.steps=3"), tmp_path)

    def overflow(call: int, out: dict[str, torch.Tensor]) -> None:
        if call == 2:
            out["loss"].register_hook(lambda grad: grad * math.inf)

    scale = run.scaler.get_scale()
    Tampered(run, overflow)
    assert fit(run, StopRequest())[0] == 0
    rows = read_metrics(tmp_path)
    assert rows[1]["nonfinite"] == ["gradients"]
    assert rows[1]["loss_scale"] <= scale / 2
    assert run.nonfinite["total"] == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 138), (signal.SIGHUP, 129)])
def test_stop_request_saves_and_leaves(tmp_path: Path, number: int, code: int):
    run = make_run(small_config("train.checkpoint_every=100"), tmp_path)
    assert fit(run, stop_after(run, 2, number))[0] == code
    assert [path.name for path in find_checkpoints(run.folder.checkpoints)] == ["step_00000002.pt"]
    assert len(read_metrics(tmp_path)) == 2
    assert run.folder.teacher.exists()


def test_stop_request_in_the_last_step_is_done(tmp_path: Path):
    run = make_run(small_config("train.steps=2"), tmp_path)
    assert fit(run, stop_after(run, 2))[0] == 0


def test_teacher_is_exported_with_every_checkpoint_kept(tmp_path: Path):
    exported = []
    run = make_run(small_config(), tmp_path, export=lambda model, path: exported.append((run.step, path)))
    fit(run, StopRequest())
    assert exported == [(step, tmp_path / "exported" / "teacher.safetensors") for step in (2, 4, 6)]


def test_checkpoints_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each step takes 40 s of this clock: a checkpoint a minute is one every second step, from the last one on."""
    now, saved = [0.0], []
    run = make_run(
        small_config("train.checkpoint_minutes=1", "train.checkpoint_every=5", "train.steps=8"),
        tmp_path, export=lambda model, path: saved.append(run.step),
    )  # fmt: skip
    Tampered(run, lambda call, out: now.__setitem__(0, 40.0 * call))
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    assert fit(run, StopRequest())[0] == 0
    assert saved == [2, 4, 5, 7, 8]


def test_full_disk_in_the_middle_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    run = make_run(small_config("train.keep_checkpoints=1"), tmp_path)
    write = checkpoint._write

    def full(path: Path, state: Any) -> None:
        if state["step"] == 4:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, state)
        if state["step"] == 2:
            seen.append(path.name)

    seen: list[str] = []
    monkeypatch.setattr(checkpoint, "_write", full)
    assert fit(run, StopRequest())[0] == 0
    assert "step_00000004.pt could not be written (No space left on device); the last good one is step_00000002.pt" in (
        caplog.text
    )
    assert [path.name for path in run.folder.checkpoints.iterdir()] == ["step_00000006.pt"]
    assert len(read_metrics(tmp_path)) == 6


@pytest.mark.parametrize("end", ["last step", "signal"])
def test_full_disk_at_the_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str):
    run = make_run(small_config("train.steps=4" if end == "last step" else "train.steps=9"), tmp_path)

    def full(path: Path, state: Any) -> None:
        if state["step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, state)

    write = checkpoint._write
    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(UserError) as error:
        fit(run, StopRequest() if end == "last step" else stop_after(run, 4))
    assert str(error.value) == (
        f"checkpoint {run.folder.checkpoints}/step_00000004.pt could not be written (No space left on device);"
        " the last good one is step_00000002.pt; make room and go on with --resume"
    )
    assert [path.name for path in find_checkpoints(run.folder.checkpoints)] == ["step_00000002.pt"]


def test_metrics_that_cannot_be_written_do_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    run = make_run(small_config("train.steps=3"), tmp_path)
    monkeypatch.setattr(loop.MetricsWriter, "__init__", full_after(loop.MetricsWriter.__init__))
    assert fit(run, StopRequest())[0] == 0
    assert caplog.text.count("metrics.jsonl: cannot be written (No space left on device)") == 1


def full_after(init):
    def patched(self, *args: Any) -> None:
        init(self, *args)
        self._file.close()
        self._file = open("/dev/full", "a", buffering=1)  # noqa: SIM115

    return patched


def test_dense_baseline_without_predicted_patches(tmp_path: Path):
    overrides = ["model.masking=none", "model.student_ratio=1", "model.teacher_ratio=1", "train.steps=2"]
    run = make_run(small_config(*overrides), tmp_path)
    assert fit(run, StopRequest())[0] == 0
    assert read_metrics(tmp_path)[0]["pixel_loss"] == 0
