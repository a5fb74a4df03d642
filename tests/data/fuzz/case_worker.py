"""The process that runs cases: `python -m fuzz.case_worker SOCKET`. It may die, hang or run out of memory."""

import contextlib
import os
import resource
import sys
import traceback
from pathlib import Path
from zlib import crc32

import numpy as np

from fuzz.target import Target, emptied
from fuzz.targets import TARGETS
from pera_fast.data.decoding.worker import serve

_MEMORY = 2**29  # bytes that a case may take
_ADDRESSES = 2**33  # beyond what this process has mapped: a runaway must not take the machine along


class Cases:
    """Answers (folder, target, seed, number) with (outcome, what was found or "")."""

    def __init__(self) -> None:
        self._targets: dict[str, Target] = {}
        self._limited = False

    def __call__(self, folder, name, seed, number, say):
        target = self._targets.get(name)
        if target is None:
            target = self._targets[name] = TARGETS[name](Path(folder) / name)
        if not self._limited:
            self._limited = True
            limit = _status(os.getpid(), "VmSize") + _ADDRESSES
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        emptied(target.case)
        before = {pid: _mark(pid) for pid in (os.getpid(), *target.workers())}
        try:
            outcome, found = target.run(case_rng(seed, name, number)), ""
        except Exception as error:
            outcome, found = "FOUND", f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-8)}"
        grown = {pid: _status(pid, "VmHWM") - start for pid, start in before.items()}
        if not found and (most := max(grown.values())) > _MEMORY:
            outcome, found = "FOUND", f"took {most / 2**20:.0f} MiB"
        return outcome, found


def case_rng(seed: int, name: str, number: int) -> np.random.Generator:
    """The draws of a case: the same ones whenever it runs."""
    return np.random.default_rng([seed, crc32(name.encode()), number])


def _mark(pid: int) -> int:
    """The process's memory now, from which its greatest is counted anew."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    return _status(pid, "VmRSS")


def _status(pid: int, name: str) -> int:
    """Bytes that /proc says; 0 where the process has gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    serve(int(sys.argv[1]), Cases())
