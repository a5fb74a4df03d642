"""Points in processes of their own: simulated ones side by side, real ones one after the other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace

from pera_fast.profile.points import Point

COMMAND = (sys.executable, "-m", "pera_fast.profile.measure")


def run_points(
    points: Sequence[Point],
    jobs: int = 1,
    done: Callable[[Point], None] = lambda point: None,
    command: Sequence[str] = COMMAND,
) -> list[Point]:
    """All points, in their order; one that fails says so and the others go on.

    Args:
        jobs: processes at a time.
        done: called with each point that was run, in the order in which they end.
        command: what runs a point.
    """
    # Largest first: they take longest, and the last to end decides when all are done.
    order = sorted(range(len(points)), key=lambda i: -points[i].batch_size) if jobs > 1 else range(len(points))
    found: dict[int, Point] = {}
    pool = ThreadPoolExecutor(max(jobs, 1))
    try:
        waiting = {pool.submit(run_point, points[i], command): i for i in order}
        for future in as_completed(waiting):
            found[waiting[future]] = future.result()
            done(found[waiting[future]])
    finally:
        pool.shutdown(cancel_futures=True)  # after an interrupt none is started any more
    return [found[i] for i in range(len(points))]


def run_point(point: Point, command: Sequence[str] = COMMAND) -> Point:
    """One point in a fresh process."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path)}
    if point.device == "simulate":
        environment.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")  # several run side by side, none on a device
    request = json.dumps(point.to_json())
    ended = subprocess.run(command, input=request, capture_output=True, text=True, env=environment, check=False)
    lines = ended.stdout.strip().splitlines()
    if ended.returncode == 0 and lines:
        return Point.from_json(json.loads(lines[-1]))
    if ended.returncode == -signal.SIGKILL:  # what the system does to a process that takes too much
        return replace(point, status="out of memory", note="the system killed the process")
    said = ended.stderr.strip().splitlines()
    why = said[-1] if said else f"ended with status {ended.returncode}"
    return replace(point, status="failed", note=" ".join(why.split())[:200])


def simulating_jobs() -> int:
    """Processes that simulate at a time: one a core."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
