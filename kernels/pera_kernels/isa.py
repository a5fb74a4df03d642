"""The instruction set that native CPU kernels are chosen by."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from functools import cache
from typing import Any

import torch

ENVIRONMENT = "PERA_MAX_ISA"


class Isa(IntEnum):
    """Instruction sets, each with those before it. ``BASE`` is AVX2, or what another processor than x86-64 has.

    ``AVX512`` has the parts F, BW, DQ and VL; ``AMX`` the tiles and their bfloat16 products.
    """

    BASE = 0
    AVX512 = 1
    AVX512_BF16 = 2
    AMX = 3


_limit: Isa | None = None


def _capabilities() -> Mapping[str, Any]:
    """By PyTorch's names; older PyTorch says less: there AVX-512 counts from the CPUs on that have VNNI."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    avx512, tiles = (
        torch.cpu._is_avx512_supported() and torch.cpu._is_vnni_supported(),
        torch.cpu._is_amx_tile_supported(),
    )
    parts = {f"avx512_{part}": avx512 for part in ("f", "bw", "dq", "vl")}
    return {**parts, "avx512_bf16": torch.cpu._is_avx512_bf16_supported(), "amx_tile": tiles, "amx_bf16": tiles}


@cache
def _of_this_cpu() -> Isa:
    has = _capabilities()
    if not all(has.get(f"avx512_{part}", False) for part in ("f", "bw", "dq", "vl")):
        return Isa.BASE
    if not has.get("avx512_bf16", False):
        return Isa.AVX512
    # The system lets a process use tiles only after it has asked for them.
    has_tiles = has.get("amx_tile", False) and has.get("amx_bf16", False)
    return Isa.AMX if has_tiles and torch.cpu._init_amx() else Isa.AVX512_BF16


def isa() -> Isa:
    """The most that native kernels use here: what the CPU has, up to ``PERA_MAX_ISA`` or ``at_most``.

    Raises:
        ValueError: the environment variable ``PERA_MAX_ISA`` names no instruction set.
    """
    if _limit is not None:
        return min(_limit, _of_this_cpu())
    wanted = os.environ.get(ENVIRONMENT, "").strip().upper()
    if wanted and wanted not in Isa.__members__:
        allowed = ", ".join(name.lower() for name in Isa.__members__)
        raise ValueError(f"{ENVIRONMENT}={wanted.lower()}: no such instruction set; allowed: {allowed}")
    return min(Isa[wanted], _of_this_cpu()) if wanted else _of_this_cpu()


@contextmanager
def at_most(limit: Isa) -> Iterator[None]:
    """While the block runs, for all threads: native kernels use no more than that; overrides ``PERA_MAX_ISA``."""
    global _limit
    before, _limit = _limit, limit
    try:
        yield
    finally:
        _limit = before
