"""Freed memory is handed out again; in a process of its own, because the settings stay."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from pera_fast.train.host_memory import reuse_freed_memory
if sys.argv[1] == "reuse" and not reuse_freed_memory():
    sys.exit(77)
def step():
    kept = [torch.ones(12 * 2**20 + 4096 * i) for i in range(4)]  # 48 MiB each: more than glibc ever keeps by itself
    return sum(float(x[0]) for x in kept)
for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("this C library has no mallopt")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_large_tensors_are_not_mapped_anew() -> None:
    assert faults("reuse") * 10 < faults("default")
