"""`pera_bench.quick trace` with a stand-in for the GPU and its profiler: what it writes, and when."""

import csv
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pera_bench import quick

pytest.importorskip("triton")
STEPS = 4  # of a round, by default


@contextmanager
def profile(activities):
    """Two kernels, a copy on the host."""
    gpu, host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    made = [("gelu_fwd_kernel", 500.0, gpu)] * 2 * STEPS + [("other", 2000.0, gpu)] * STEPS + [("copy", 9.0, host)]
    events = [SimpleNamespace(name=name, device_time=time, device_type=kind) for name, time, kind in made]
    yield SimpleNamespace(events=lambda: events)


@pytest.fixture
def traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the part on tiny; returns the line that it wrote."""
    monkeypatch.setattr(quick, "real_step", lambda cfg, device: lambda: None)
    monkeypatch.setattr(quick, "copy_bandwidth", lambda device, now: 4e12)
    monkeypatch.setattr(torch.profiler, "profile", profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    path = tmp_path / "trace" / "trace.json"
    command = ["quick", "trace", "--recipe", "tiny", "--batch", "2", "--csv", str(tmp_path / "kernels.csv")]
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(path)])

    def run() -> dict:
        quick.main()
        return json.loads(path.read_text())

    run.path = path
    return run


def test_times_are_of_a_step_and_bytes_are_counted(traced, tmp_path: Path) -> None:
    line = traced()
    with (tmp_path / "kernels.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[1:] == [["2.0000", "1.0", "other"], ["1.0000", "2.0", "gelu_fwd_kernel"]]
    assert (line["busy_ms"], line["launches"], line["copy"], line["capability"]) == (3.0, 3.0, 4e12, [9, 0])
    assert line["counted"]["gelu_fwd_kernel"][0] > 0
    assert all(isinstance(value, int) for pair in line["counted"].values() for value in pair)


def test_what_a_gpu_measured_is_there_before_anything_is_counted(traced, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fails(cfg, capability):
        seen.append((json.loads(traced.path.read_text())["copy"], capability, cfg.train.batch_size))
        raise TypeError("no")

    monkeypatch.setattr(quick, "count_kernels", fails)
    line = traced()
    assert seen == [(4e12, (9, 0), 2)]
    assert line["uncounted"] == "TypeError: no"
    assert "counted" not in line
