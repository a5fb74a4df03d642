"""Runs points in processes: each real one in a fresh process, simulated ones in parallel, one a core."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import replace

from pera_fast.cores import default_workers
from pera_fast.profile.points import Point
from pera_fast.storage import start

COMMAND = (sys.executable, "-m", "pera_fast.profile.measure")
Done = Callable[[Point], None]


def run_points(
    points: Sequence[Point], jobs: int = 1, done: Done = lambda point: None, command: Sequence[str] = COMMAND
) -> list[Point]:
    """All points, in their order; one that fails says so and the others go on.

    Args:
        jobs: processes that simulate at a time; real points run one after the other.
        done: called with each point that was run, in the order in which they end.
        command: what runs points.
    """
    stopped: list[bool] = []
    simulated = [i for i, p in enumerate(points) if p.device == "simulate"]
    # Points of one batch size stay together: what one variant has found about an op's shapes serves the next.
    simulated.sort(key=lambda i: points[i].batch_size)
    size = -(-len(simulated) // max(jobs, 1)) or 1
    parts = [simulated[start : start + size] for start in range(0, len(simulated), size)]
    real = [i for i, p in enumerate(points) if p.device != "simulate"]
    found: dict[int, Point] = {}

    def run(part: Sequence[int], fresh: bool) -> None:
        worker = Worker(command, simulates=not fresh)
        try:
            for i in part:
                found[i] = worker.run(points[i])
                done(found[i])
                if fresh or not found[i].ok:
                    worker.close()
                if stopped:
                    break
        finally:
            worker.close()

    with _pool(max(jobs, 1), stopped) as pool:
        for future in as_completed([pool.submit(run, part, False) for part in parts]):
            future.result()
        if real:
            pool.submit(run, real, True).result()
    return [found[i] for i in range(len(points))]


@contextmanager
def _pool(threads: int, stopped: list[bool]) -> Iterator[ThreadPoolExecutor]:
    """Threads that begin nothing more after an interrupt."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    except BaseException:
        stopped.append(True)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


class Worker:
    """A process that takes points on stdin and gives them back on stdout; started when it is needed."""

    def __init__(self, command: Sequence[str] = COMMAND, simulates: bool = False) -> None:
        self._command, self._simulates = command, simulates
        self._process: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - of all processes

    def run(self, point: Point) -> Point:
        """The point with what was found, or with what became of the process."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # it is gone already
            print(json.dumps(point.to_json()), file=process.stdin, flush=True)
            for line in process.stdout:
                if line.startswith('{"variant"'):  # not what some library may print
                    return Point.from_json(json.loads(line))
        return self._ended(point, process.wait())

    def close(self) -> None:
        """Ends the process; the next point gets another."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # it is gone already
            process.stdin.close()
        process.stdout.close()
        process.wait()

    def _start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path)}
        if self._simulates:
            environment.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")  # several at a time, none on a device
        self._errors.seek(0)
        self._errors.truncate()
        pipe = subprocess.PIPE
        return start(
            "the process that measures",
            lambda: subprocess.Popen(
                self._command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True, env=environment
            ),
        )

    def _ended(self, point: Point, status: int) -> Point:
        if status == -signal.SIGKILL:  # what the system does to a process that takes too much
            return replace(point, status="out of memory", note="the system killed the process")
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()
        why = said[-1] if said else f"the process ended with status {status}"
        return replace(point, status="failed", note=" ".join(why.split())[:200])


def simulating_jobs() -> int:
    """Processes that simulate at a time: one a core, up to a few, for each takes up to a GB."""
    return default_workers(8)
