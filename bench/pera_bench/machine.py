"""Describes the machine of a measurement: device, threads, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import datetime, timezone
from typing import Any

import torch

from pera_fast import __version__
from pera_fast.profile.machine import commit, device_name
from pera_kernels.isa import Isa, isa


def describe(device: torch.device, processor: bool = False) -> dict[str, Any]:
    """Machine part of a measurement's record; `processor`: its times are processor time."""
    facts = {
        "device": device_name(device.type),
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "clock": "processor" if processor else "wall",
        "pinned": os.environ.get("OMP_PROC_BIND", "false").lower() not in ("", "false"),
        "cpu": device_name("cpu"),
        "cpu_capability": _capability(),
        "load_before": os.getloadavg()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "xformers": _version("xformers"),
        "python": platform.python_version(),
        "commit": commit() or f"version {__version__}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["memory_gib"] = properties.total_memory / 2**30
        facts["arch"] = f"sm_{properties.major}{properties.minor}"
    return facts


def _capability() -> str:
    """PyTorch's name of the instruction set, and the products in bf16 that this processor has."""
    half = {Isa.AVX512_BF16: " with BF16", Isa.AMX: " with AMX"}.get(isa(), "")
    return torch.backends.cpu.get_cpu_capability() + half


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
