"""One row: median and spread of the time, and what follows from it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from pera_bench.timing import Memory, clock, flusher
from pera_bench.work import COMPILED, Unavailable, Whole, Work

MIN_ROUNDS, MAX_ROUNDS = 5, 200
FEW_ROUNDS = 3  # of calls that take long, or when there is no time


@dataclass
class Measure:
    """Times one implementation of what a suite made.

    Attributes:
        benchmark: pytest-benchmark's fixture.
        device: where it runs.
        seconds: that the timed calls may take together, if MIN_ROUNDS of them take less.
        ceilings: bytes/s and FLOP/s that this machine can do.
    """

    benchmark: Any
    device: torch.device
    seconds: float
    ceilings: dict[str, float]

    def __call__(self, made: Work | Whole, direction: str, implementation: str) -> dict[str, Any]:
        """The row's numbers. Skips the test where the implementation cannot run."""
        try:
            return self._measure(made, direction, implementation)
        except Unavailable as reason:
            pytest.skip(str(reason))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            pytest.skip("out of memory")

    def _measure(self, made: Work | Whole, direction: str, implementation: str) -> dict[str, Any]:
        now, whole, resident = clock(self.device), isinstance(made, Whole), 0
        if whole:  # its weights and optimiser state are part of what it needs
            with Memory(self.device) as memory:
                run = made.run(direction, implementation)
                with run.context():
                    run.call()
            resident = memory.left
        else:
            run = made.run(direction, implementation)
            with run.context():
                self._warm_up(run.call, implementation)
        with run.context():
            start = now()
            with Memory(self.device) as memory:
                run.call()
            seconds = now() - start
            if not whole:  # again: a profile's start and end would be much of a short call's time
                start = now()
                run.call()
                seconds = now() - start
            error = run.error() if run.error else None
            busy = self._time(run.call, seconds)
        peak = (resident + memory.peak) / 2**20 or None  # the loader allocates in another thread: unknown
        row = {"implementation": run.implementation or implementation, "error": error, "peak_mib": peak, "busy": busy}
        return row | self._numbers(run.cost.moved, run.cost.flops)

    def _warm_up(self, call: Any, implementation: str) -> None:
        """The first call: kernels and graphs are compiled."""
        try:
            call()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if implementation != COMPILED:
                raise
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise Unavailable(f"torch.compile: {reason.strip()[:200]}") from error

    def _time(self, call: Any, first: float) -> float | None:
        """Takes the times. Returns the share of them in which this thread ran, on a CPU: others took the rest."""
        fitting = int(self.seconds / max(first, 1e-7))
        least = FEW_ROUNDS if first > 1 or self.seconds < 0.1 else MIN_ROUNDS
        rounds = min(max(fitting, least), MAX_ROUNDS)
        start, ran = time.perf_counter(), time.thread_time()
        self.benchmark.pedantic(call, setup=flusher(self.device), rounds=rounds)
        if self.device.type != "cpu":
            return None
        return (time.thread_time() - ran) / (time.perf_counter() - start)

    def _numbers(self, moved: int, flops: int) -> dict[str, Any]:
        s = self.benchmark.stats.stats
        numbers = {
            "median_s": s.median, "q1_s": s.q1, "q3_s": s.q3, "min_s": s.min, "max_s": s.max, "rounds": s.rounds,
        }  # fmt: skip
        if moved:
            numbers |= {"moved_bytes": moved, "of_copy": moved / s.median / self.ceilings["copy"]}
        if flops:
            numbers |= {"flops": flops, "of_matrix": flops / s.median / self.ceilings["matrix"]}
        return numbers
