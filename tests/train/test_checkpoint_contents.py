"""Checkpoints that are whole but hold what no run of this model wrote: named in one line when they are resumed.

Found by `python -m tests.data.fuzz --only checkpoint-contents`.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_support import make_run, small_config

from pera_fast.errors import UserError
from pera_fast.train.checkpoint import load_newest, save_checkpoint
from pera_fast.train.loop import Run


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> dict[str, Any]:
    """State of a run after an update."""
    run = make_run(small_config(), tmp_path_factory.mktemp("run"))
    for parameter in run.pera.parameters():
        parameter.grad = torch.full_like(parameter, 0.1) if parameter.requires_grad else None
    run.optimizer.step()
    run.step = run.position = 4
    return run.state()


def changed(state: dict[str, Any], path: tuple, change: Callable[[Any], Any]) -> Any:
    """A copy in which the value at this path is another."""
    if not path:
        return change(state)
    copy = dict(state) if isinstance(state, dict) else list(state)
    copy[path[0]] = changed(copy[path[0]], path[1:], change)
    return copy


def resume(run: Run, folder: Path) -> None:
    """What `--resume` does with the newest checkpoint of a folder."""
    found = load_newest(folder)
    assert found is not None
    run.load(found[1], str(folder))


WEIGHT, MOMENTS = ("model", "teacher.backbone.norm.weight"), ("optimizer", "state", 0)
GROUP = ("optimizer", "param_groups", 0)
ODD = {
    "a weight that is NaN": (WEIGHT, lambda w: w * math.nan, "teacher.backbone.norm.weight is not finite"),
    "a weight of integers": (WEIGHT, lambda w: w.long(), "is torch.int64"),
    "a weight that is no tensor": (WEIGHT, lambda w: "weight", "is no tensor but str"),
    "a sparse weight": (WEIGHT, lambda w: w.to_sparse(), "is no tensor but Tensor"),
    "a weight of another shape": (WEIGHT, lambda w: w[1:], r"is torch.float32 \(15,\) instead of"),
    "a weight too many": (("model",), lambda m: {**m, "more": torch.ones(1)}, "more is not of this model"),
    "a key that is no name": (("model",), lambda m: {**m, 1: torch.ones(1)}, "1 is not of this model"),
    "a moment is missing": (MOMENTS, lambda m: {"step": m["step"]}, "state of parameter 0 is not complete"),
    "a moment of another shape": ((*MOMENTS, "exp_avg"), lambda m: m.flatten()[:-1], "exp_avg is torch.float32"),
    "a moment that is NaN": ((*MOMENTS, "exp_avg_sq"), lambda m: m * math.nan, "exp_avg_sq is not finite"),
    "moments of no parameter": (("optimizer", "state"), lambda s: {**s, 999: s[0]}, "of other parameters"),
    "no moments": (("optimizer", "state"), lambda s: None, "of other parameters"),
    "no groups": (("optimizer", "param_groups"), lambda g: 7, "param_groups are missing"),
    "a group that is a number": (GROUP, lambda g: 1.5, "params are others"),
    "betas that are no pair": ((*GROUP, "betas"), lambda b: [0.9], "betas is"),
    "a rate that is a text": ((*GROUP, "lr"), lambda rate: "fast", "lr is 'fast'"),
    "steps below zero": (("step",), lambda step: -5, "step is -5"),
    "steps that are a truth": (("step",), lambda step: True, "step is True"),
    "no images": (("images",), lambda count: 0, "images is 0"),
    "a position that is a text": (("position",), lambda place: "4", "position is '4'"),
    "counters under other names": (("nonfinite",), lambda counts: {1: 2}, "nonfinite.total is None"),
}


@pytest.mark.parametrize("kind", ODD)
def test_contents_that_do_not_fit_are_named(state, tmp_path, kind):
    path, change, told = ODD[kind]
    save_checkpoint(tmp_path, {**changed(state, path, change), "step": 4}, 1)
    if path == ("step",):
        torch.save(changed(state, path, change), tmp_path / "step_00000004.pt")
    run = make_run(small_config(), tmp_path / "run")
    with pytest.raises(UserError, match=told) as error:
        resume(run, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bits", [0x10, 0xFFFFFFFF])
def test_a_tensor_that_the_directory_calls_a_folder_is_not_read(state, tmp_path, bits):
    """The checksums hold, but PyTorch left what memory happened to hold in its place."""
    path = save_checkpoint(tmp_path, state, 1)
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\1\2", 0, data.rindex(b"data/5"))
    data[entry + 38 : entry + 42] = bits.to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged checkpoint \(its directory says something odd of .*/data/5"):
        load_newest(tmp_path)


def test_what_a_run_wrote_fits(state, tmp_path):
    save_checkpoint(tmp_path, state, 1)
    run = make_run(small_config(), tmp_path / "run")
    resume(run, tmp_path)
    assert all(torch.equal(value, run.pera.state_dict()[name]) for name, value in state["model"].items())
