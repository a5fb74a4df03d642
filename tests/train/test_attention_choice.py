"""`model.attention`: what it makes the op choose, and what is said of it."""

import pytest
import torch

from pera_fast.config import load_config
from pera_fast.errors import UserError
from pera_fast.train.attention import describe_attention, prefer_attention, sequence_lengths, why_attention
from pera_kernels import backend
from pera_kernels.attention import cudnn, measured
from pera_kernels.isa import Isa, at_most

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_preferred():
    yield
    backend.prefer("attention", None)


def test_the_configured_one_runs() -> None:
    prefer_attention(load_config("tiny", ["model.attention=sdpa"]), CPU)
    assert backend.wanted("attention") == "sdpa"
    prefer_attention(load_config("tiny"), CPU)
    assert backend.wanted("attention") is None


def test_what_cannot_run_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^model.attention=cudnn: cuDNN's attention runs on a GPU, not on cpu; leave"):
        prefer_attention(load_config("tiny", ["model.attention=cudnn"]), CPU)
    assert backend.wanted("attention") is None
    with pytest.raises(UserError, match=r"model\.attention=flash: allowed"):
        load_config("tiny", ["model.attention=flash"])


def test_lengths_are_those_of_the_networks() -> None:
    assert sequence_lengths(load_config("vit_b16")) == [471, 315, 158, 23, 8]
    with at_most(Isa.BASE):
        assert describe_attention(load_config("vit_b16"), CPU) == "sdpa for sequences of 471, 315, 158, 23, 8 tokens"


def test_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    assert why_attention(load_config("tiny", ["model.attention=varlen"]), cuda) == "model.attention=varlen"
    assert "amx in bf16 on a CPU with AMX" in why_attention(load_config("vit_b16"), CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    said = why_attention(load_config("vit_b16"), cuda)
    assert "cudnn was the fastest on compute capability 9.0 for 158, 315, 471 tokens (H200, torch 2.11" in said
    assert said.endswith("triton for at most 32 tokens")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    assert "no measurement on compute capability 8.6: xformers" in why_attention(load_config("vit_b16"), cuda)


@pytest.mark.parametrize(("capability", "runs"), [((9, 0), True), ((8, 0), False), ((7, 5), False)])
def test_cudnn_runs_where_it_was_measured(monkeypatch: pytest.MonkeyPatch, capability, runs: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    device = torch.device("cuda", 0)
    assert (cudnn.available(device) is None) == runs
    assert (measured.fastest(capability) == "cudnn") == runs
    backend.prefer("attention", "cudnn")  # asked for, it runs wherever it can
    assert (cudnn.available(device) is None) == (capability >= (8, 0))
    torch.use_deterministic_algorithms(True)
    try:
        assert cudnn.available(device) is not None
    finally:
        torch.use_deterministic_algorithms(False)
