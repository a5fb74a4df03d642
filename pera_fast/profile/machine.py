"""Describes the machine of a profile: device, versions, commit, date."""

from __future__ import annotations

import platform
import shutil
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch

from pera_fast import __version__


def describe(device: str) -> dict[str, Any]:
    """Everything that a number needs beside it.

    Args:
        device: simulate, cpu or cuda.
    """
    facts: dict[str, Any] = {
        "device": device,
        "device_name": device_name(device),
        "pera_fast": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit(),
        "date": date.today().isoformat(),
    }
    if device == "cpu":
        facts["threads"] = torch.get_num_threads()
    if device == "cuda":
        facts["memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return facts


def device_name(device: str) -> str:
    """The maker's name for it."""
    if device == "simulate":
        return "simulated: no device"
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux, or no /proc
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of this source, with -dirty behind it if it was changed; None where it is not a checkout."""
    folder = Path(__file__).resolve().parents[2]
    if shutil.which("git") is None or not (folder / ".git").exists():
        return None  # an installed package inside somebody else's checkout is not that checkout's commit
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
