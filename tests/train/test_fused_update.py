"""The update by one op in a run on a CPU, against PyTorch's operators, and the copies of the weights that it writes."""

from pathlib import Path

import pytest
import torch
import train_support
from implementations import why_not
from torch import Tensor
from train_support import EXACT, make_run, small_config

from pera_fast.train.compute_copies import copy_of
from pera_fast.train.loop import fit
from pera_fast.train.signals import StopRequest
from pera_kernels import backend, products

STEPS = {"fp32": 6, "bf16": 6, "fp16": 16}  # a loss scale comes down first


@pytest.fixture(autouse=True)
def native():
    if reason := why_not("adamw_ema", "native"):
        pytest.skip(reason)


def trained(out: Path, precision: str) -> tuple[dict[str, Tensor], train_support.Run]:
    steps = STEPS[precision]
    run = make_run(small_config(*EXACT, f"train.precision={precision}", f"train.steps={steps}"), out)
    assert fit(run, StopRequest())[0] == 0
    assert run.step == steps
    return run.pera.state_dict(), run


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_is_that_with_pytorchs_operators(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, run = trained(tmp_path / "ours", precision)
    assert run.update is not None
    with monkeypatch.context() as patch:
        patch.setattr(train_support, "make_update", lambda *_: None)
        theirs, plain = trained(tmp_path / "theirs", precision)
    assert ours["center"].norm() > 0
    for name, value in theirs.items():
        if name.endswith("qkv.bias"):  # the keys' part has no gradient but rounding, which AdamW makes as large as any
            continue
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5, msg=name)
    state = [{**optimizer.state_dict()["state"][0]} for optimizer in (run.optimizer, plain.optimizer)]
    assert state[0].keys() == state[1].keys()
    assert state[0]["step"] == state[1]["step"] > 0
    assert run.scaler.state_dict() == plain.scaler.state_dict()


def test_copies_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with products.half_products():  # also on a CPU that multiplies in float32
        ours, run = trained(tmp_path / "copies", "bf16")
        copied = [p for p in run.pera.parameters() if copy_of(p) is not None]
        assert len(copied) > 20
        for parameter in copied:
            copy = copy_of(parameter)
            assert torch.equal(copy, parameter.bfloat16())
            assert products.in_dtype(parameter, torch.bfloat16) is copy
        with monkeypatch.context() as patch:
            patch.setattr(train_support, "make_copies", lambda _: None)
            plain, run = trained(tmp_path / "plain", "bf16")
    assert not any(copy_of(p) is not None for p in run.pera.parameters())
    for name, value in plain.items():
        assert torch.equal(ours[name], value), name


def test_without_the_op_there_are_neither_copies_nor_update(tmp_path: Path) -> None:
    with backend.use("reference"), products.half_products():
        run = make_run(small_config("train.precision=bf16"), tmp_path)
        assert run.update is None
        assert not any(copy_of(p) is not None for p in run.pera.parameters())
