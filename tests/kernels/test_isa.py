"""The instruction set that native kernels are chosen by."""

import pytest
import torch

from pera_kernels import isa as module
from pera_kernels.isa import Isa, at_most, isa


@pytest.fixture(autouse=True)
def no_limit(monkeypatch):
    monkeypatch.delenv("PERA_MAX_ISA", raising=False)


def test_a_limit_holds(monkeypatch):
    everything = isa()
    monkeypatch.setenv("PERA_MAX_ISA", "Base")
    assert isa() is Isa.BASE
    with at_most(Isa.AMX):
        assert isa() is everything
        with at_most(Isa.BASE):
            assert isa() is Isa.BASE
        assert isa() is everything
    monkeypatch.setenv("PERA_MAX_ISA", "amx")
    assert isa() is everything


def test_a_wrong_limit_is_named(monkeypatch):
    monkeypatch.setenv("PERA_MAX_ISA", "sse")
    with pytest.raises(ValueError, match="PERA_MAX_ISA=sse: no such instruction set; allowed: base, avx512, avx512_b"):
        isa()


PARTS = {f"avx512_{part}": True for part in ("f", "bw", "dq", "vl")}
TILES = {"amx_tile": True, "amx_bf16": True}


@pytest.mark.parametrize(
    ("has", "expected"),
    [
        ("", Isa.BASE),
        ("avx512", Isa.BASE),  # the first of them have not all its parts
        ("avx512 vnni", Isa.AVX512),
        ("avx512 vnni avx512_bf16", Isa.AVX512_BF16),
        ("avx512 vnni avx512_bf16 amx_tile", Isa.AMX),
    ],
)
def test_older_pytorch_is_asked_otherwise(monkeypatch, has, expected):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    for name in ("avx512", "vnni", "avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in has.split())
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: True)
    assert module._of_this_cpu.__wrapped__() is expected


@pytest.mark.parametrize(
    ("capabilities", "permitted", "expected"),
    [
        ({}, True, Isa.BASE),
        (PARTS | {"avx512_vl": False, "avx512_bf16": True}, True, Isa.BASE),
        (PARTS, True, Isa.AVX512),
        (PARTS | TILES, True, Isa.AVX512),
        (PARTS | {"avx512_bf16": True}, True, Isa.AVX512_BF16),
        (PARTS | {"avx512_bf16": True} | TILES, True, Isa.AMX),
        (PARTS | {"avx512_bf16": True} | TILES, False, Isa.AVX512_BF16),
        (PARTS | {"avx512_bf16": True, "amx_tile": True}, True, Isa.AVX512_BF16),
    ],
)
def test_of_a_processor(monkeypatch, capabilities, permitted, expected):
    """The system may refuse the use of tiles."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: permitted)
    assert module._of_this_cpu.__wrapped__() is expected
