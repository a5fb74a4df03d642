"""Points in processes that end in every way: what happened is told, and the others go on."""

import sys

import pytest
from profile_support import SPARSE

from pera_fast.profile.measure import is_out_of_memory, measure
from pera_fast.profile.points import Point, Variant
from pera_fast.profile.processes import run_points

# Stands in for a worker; what it does goes by the batch size.
WORKER = """
import json, os, signal, sys
for line in sys.stdin:
    point = json.loads(line)
    size = point["batch_size"]
    if size == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if size == 3:
        raise ValueError("no such\\nluck")
    if size == 4:
        sys.exit(7)
    print("what a library prints")
    point.update(status="ok", peak=os.getpid())
    print(json.dumps(point), flush=True)
"""
COMMAND = (sys.executable, "-c", WORKER)


def points(device: str, sizes: list[int]) -> list[Point]:
    return [Point(SPARSE, size, device) for size in sizes]


@pytest.mark.parametrize("device", ["cpu", "simulate"])
def test_what_fails_is_told_and_the_rest_goes_on(device: str) -> None:
    seen: list[int] = []
    found = run_points(points(device, [1, 2, 3, 4, 5]), 1, lambda p: seen.append(p.batch_size), COMMAND)
    assert [p.status for p in found] == ["ok", "out of memory", "failed", "failed", "ok"]
    assert found[1].note == "the system killed the process"
    assert found[2].note == "luck"
    assert found[3].note == "the process ended with status 7"
    assert sorted(seen) == [1, 2, 3, 4, 5]


def test_real_points_have_a_process_each_and_simulated_ones_share() -> None:
    real = run_points(points("cpu", [10, 20, 30]), 2, command=COMMAND)
    assert len({p.peak for p in real}) == 3
    simulated = run_points(points("simulate", [30, 10, 30, 10]), 2, command=COMMAND)
    assert [p.batch_size for p in simulated] == [30, 10, 30, 10], "in the order that was asked for"
    assert simulated[0].peak == simulated[2].peak != simulated[1].peak == simulated[3].peak


def test_out_of_memory_is_a_finding() -> None:
    found = measure(Point(Variant("tiny"), 10**7, "cpu", steps=1))  # half a petabyte of pixels
    assert found.status == "out of memory"
    assert "allocate" in found.note
    assert is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
