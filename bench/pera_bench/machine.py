"""What a measurement was taken on: device, threads, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from pera_fast import __version__


def device_name(device: torch.device) -> str:
    """The maker's name of the GPU or processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit of a checkout, with -dirty where tracked files differ from it; else the package's version."""
    here = Path(__file__).resolve().parent
    try:
        tracked = _git(here, "ls-files", "--error-unmatch", __file__).returncode == 0
        said = _git(here, "describe", "--always", "--dirty", "--exclude=*").stdout.strip() if tracked else ""
    except OSError:  # no git
        said = ""
    return said or f"version {__version__}"


def _git(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, check=False)


def describe(device: torch.device, processor: bool = False) -> dict[str, Any]:
    """What belongs to every record of a measurement; `processor`: its times are processor time."""
    facts = {
        "device": device_name(device),
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "clock": "processor" if processor else "wall",
        "pinned": os.environ.get("OMP_PROC_BIND", "false").lower() not in ("", "false"),
        "cpu": device_name(torch.device("cpu")),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_before": os.getloadavg()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "xformers": _version("xformers"),
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["memory_gib"] = properties.total_memory / 2**30
        facts["arch"] = f"sm_{properties.major}{properties.minor}"
    return facts


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
