"""A trace of a few real steps: it loads, and the parts of a step are named in it."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from profile_support import SMALL

from pera_fast.config import load_config
from pera_fast.profile import trace as module
from pera_fast.profile.trace import trace, without_graph
from pera_fast.ranges import PREFIX
from pera_kernels import backend


def test_a_trace_has_the_named_ranges(tmp_path: Path, capsys) -> None:
    found = trace("tiny", tmp_path, "cpu", 2, [*SMALL, "train.batch_size=2", "train.precision=fp32"])
    with gzip.open(found.path) as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name", "") for event in events if event.get("ph") == "X"]
    parts = ["data", "student", "teacher", "loss", "backward", "optimiser"]
    if backend.choose("adamw_ema", torch.device("cpu")) == "reference":  # elsewhere the optimiser's pass does it
        parts.append("EMA")
    for part in ("step", *parts):
        assert names.count(PREFIX + part) == 2, f"{part}: once a step"
    assert names.count(PREFIX + "attention") == 2 * 2 * 2, "depth 2, of two networks"

    ranges = {row.name: row for row in found.ranges}
    assert ranges["step"].share == 1.0
    assert 0.8 < sum(ranges[part].share for part in parts) <= 1.0, "they are the step"
    assert sum(row.share for row in found.ops) == pytest.approx(1.0)
    assert not any(row.name.startswith(PREFIX) for row in found.ops)
    assert found.snapshot is None

    said = capsys.readouterr().out
    assert "memory snapshot: none, it needs CUDA" in said
    assert (tmp_path / "ops.csv").read_text().startswith("name,calls_per_step,seconds_per_step,share\n")
    assert "student" in (tmp_path / "ranges.csv").read_text()


@pytest.mark.parametrize("graph", ["auto", "true"])
def test_a_trace_of_a_gpu_has_ranges_and_a_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, graph: str
) -> None:
    """With steps on a CPU in place of the GPU's."""
    said: list[str] = []
    make = module.real_step

    def on_cpu(cfg, device, batches):
        said.append(f"{device.type} {cfg.train.cuda_graph}")
        step = make(replace(cfg, train=replace(cfg.train, cuda_graph="false")), torch.device("cpu"), batches)
        return lambda: (said.append("step"), step())

    def dump(path: str) -> None:
        said.append("dumped")
        Path(path).write_bytes(b"allocations")

    monkeypatch.setattr(module, "real_step", on_cpu)
    monkeypatch.setattr(module, "synchronize", lambda device: said.append("wait"))
    monkeypatch.setattr(module.machine, "device_name", lambda kind: kind)
    monkeypatch.setattr(module, "_device", lambda name: name)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **how: said.append(f"record {how}"))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    settings = [*SMALL, "train.batch_size=2", "train.precision=fp32", f"train.cuda_graph={graph}"]
    found = trace("tiny", tmp_path, "cuda", 2, settings)
    assert {"step", "data", "student", "teacher", "backward"} <= {row.name for row in found.ranges}
    assert found.snapshot is not None
    assert found.snapshot.read_bytes() == b"allocations"
    assert said[0] == ("cuda true" if graph == "true" else "cuda false")
    history = f"record {{'max_entries': {module.SNAPSHOT_EVENTS}}}"
    assert said[-5:] == [history, "step", "wait", "dumped", "record {'enabled': None}"]
    printed = capsys.readouterr().out
    assert ("a CUDA graph's replays" in printed) == (graph == "true")
    assert ("no CUDA graph: train.cuda_graph=true traces its replays" in printed) == (graph == "auto")


def test_a_trace_is_of_steps_whose_parts_run_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph's replays call no Python: neither ranges nor allocations would be seen."""
    graphs = []

    def made(cfg, *_):
        graphs.append(cfg.train.cuda_graph)
        raise InterruptedError

    monkeypatch.setattr(module, "real_step", made)
    with pytest.raises(InterruptedError):
        trace("tiny", tmp_path, "cpu", 1, [*SMALL])
    assert graphs == ["false"]
    assert without_graph(load_config("tiny", ["train.cuda_graph=true"])).train.cuda_graph == "true"
