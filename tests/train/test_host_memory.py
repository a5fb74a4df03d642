"""Freed memory is handed out again; in a process of its own, because the settings stay."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from pera_fast.train.host_memory import reuse_freed_memory
def step():
    kept = [torch.ones(12 * 2**20 + 4096 * i) for i in range(4)]  # 48 MiB each: more than glibc ever keeps by itself
    return sum(float(x[0]) for x in kept)
def faults():
    counts = []
    for _ in range(12):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step()
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counts[4:])  # a small block that lands in a freed large one can cost a step a new block, now and then
default = faults()
if not reuse_freed_memory():
    sys.exit(77)
print(default, faults())
"""


def test_large_tensors_are_not_mapped_anew() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("this C library has no mallopt")
    assert done.returncode == 0, done.stderr
    default, reused = map(int, done.stdout.split())
    assert reused * 10 < default
