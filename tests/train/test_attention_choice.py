"""`model.attention`: what it makes the op choose, and what is said of it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pera_fast.config import load_config
from pera_fast.errors import UserError
from pera_fast.info import _choices
from pera_fast.profile.on_gpu import GPU, on_gpu
from pera_fast.profile.work import Counting
from pera_fast.train.attention import describe_attention, explain_attention, prefer_attention, sequence_lengths
from pera_kernels import backend
from pera_kernels.attention import cudnn, measured, native, xformers
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


def explained_on(capability: tuple[int, int], *overrides: str) -> str:
    """The line of vit_b16 for a GPU of that compute capability, without xFormers."""
    pytest.importorskip("triton")
    gpu = on_gpu(capability, 132, 1, lambda *_: None, lambda _: None)
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True), Counting(), gpu:
        patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        patch.setattr(xformers, "_fmha", lambda: "xformers is not installed")
        return explain_attention(load_config("vit_b16", overrides), GPU)


def test_the_reason_of_each_is_said_on_a_gpu() -> None:
    said = explained_on((9, 0))
    long, short = said.split("; triton for sequences of 23, 8 tokens: ")
    assert long.startswith("cudnn for sequences of 471, 315, 158 tokens: the fastest on compute capability 9.0, ")
    assert "measured with 158, 315, 471 tokens (H200, torch 2.11" in long
    assert short.startswith("several sequences share a tile, up to 32 tokens (H200, torch 2.11")


def test_without_a_measurement_it_is_said_what_came_before() -> None:
    said = explained_on((8, 6))
    assert said.startswith("varlen for sequences of 471, 315, 158 tokens: the first that runs; not cudnn, as nobody ")
    assert "on compute capability 8.6; not xformers, as xformers is not installed; triton for" in said
    assert "amx" not in said
    single = explained_on((9, 0), "train.precision=fp32")
    assert "not cudnn, as cuDNN's attention takes bfloat16 and float16, not torch.float32; not xformers" in single
    assert "the fastest" not in single


def test_the_reason_is_said_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_config("vit_b16")
    with at_most(Isa.BASE):
        said = explain_attention(cfg, CPU)
    assert "sdpa for sequences of 471, 315, 158, 23, 8 tokens: the first that runs; not amx, as " in said
    assert "cudnn" not in said
    monkeypatch.setattr(native.amx, "available", lambda device: None)
    said = explain_attention(cfg, CPU)
    assert "the fastest on a CPU with AMX, measured with 8, 23, 158, 315, 471 tokens (Intel Xeon, torch 2.13" in said
    assert "; not amx, as it takes bfloat16" in explain_attention(load_config("vit_b16", ["train.precision=fp32"]), CPU)


def test_what_is_asked_for_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_config("tiny", ["model.attention=sdpa"])
    prefer_attention(cfg, CPU)
    assert explain_attention(cfg, CPU).endswith(" tokens: model.attention=sdpa")
    monkeypatch.setenv("PERA_BACKEND", "reference")
    assert explain_attention(load_config("tiny"), CPU).endswith(" tokens: PERA_BACKEND=reference")


def test_info_says_it_whatever_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tokens: the f" in _choices("cpu")["attention"]
    monkeypatch.setenv("PERA_BACKEND", "cudnn")
    assert _choices("cpu")["attention"] == (
        "attention: the cudnn implementation was asked for, but cuDNN's attention runs on a GPU, not on cpu"
    )


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
