"""Measures one row of a table: the times of one implementation, its memory, its error."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch

from pera_bench.ceilings import RateMeanwhile
from pera_bench.timing import Memory, clock, flusher
from pera_bench.work import COMPILED, Unavailable, Whole, Work

MIN_ROUNDS, MAX_ROUNDS = 5, 200  # of all passes together
FEW_ROUNDS = 3  # of calls that take long, or when there is no time
LONG = 1.0  # seconds
SAMPLED = 0.05  # share of a long call's time in which the rate of large products is measured, before and after it


@dataclass
class Measure:
    """Times one implementation of what a suite made.

    Attributes:
        benchmark: pytest-benchmark's fixture.
        device: where it runs.
        precision: bf16, fp16 or fp32.
        seconds: that the timed calls of all passes may take together, if MIN_ROUNDS of them take less.
        passes: over all benches.
        first: whether this is the first one, which measures memory and error too.
        processor: whether the benchmark's timer is processor time.
    """

    benchmark: Any
    device: torch.device
    precision: str
    seconds: float
    passes: int = 1
    first: bool = True
    processor: bool = False
    _lasts: float = field(default=0.0, init=False)  # seconds of the last call

    def __call__(self, made: Work | Whole, direction: str, implementation: str) -> dict[str, Any]:
        """Measure the input of `record.summarise` for a row. Skips the test where the implementation cannot run."""
        try:
            return self._measure(made, direction, implementation)
        except Unavailable as reason:
            pytest.skip(str(reason))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            pytest.skip("out of memory")

    def _measure(self, made: Work | Whole, direction: str, implementation: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.first and isinstance(made, Whole):  # its weights and optimiser state are part of what it needs
            gc.collect()  # what is freed meanwhile would count
            with Memory(self.device) as memory:
                run = made.run(direction, implementation)
                with run.context():
                    self._warm_up(run.call, implementation)
            resident = max(memory.left, 0)
        else:
            run, resident = made.run(direction, implementation), 0
            with run.context():
                self._warm_up(run.call, implementation)
        with run.context():
            if self.first:
                with Memory(self.device) as memory:
                    self._warm_up(run.call, implementation)
                # The loader allocates in another thread: unknown.
                found["peak_mib"] = (resident + memory.peak) / 2**20 or None
                found["error"] = run.error() if run.error else None
            found |= self._time(run.call)
        cost = {"moved_bytes": run.cost.moved, "flops": run.cost.flops}
        times = {"times_s": list(self.benchmark.stats.stats.data)}
        return {"implementation": run.implementation or implementation, **cost, **found, **times}

    def _warm_up(self, call: Any, implementation: str) -> None:
        """A call that does not count. In the first one kernels and graphs are compiled."""
        now = clock(self.device)
        start = now()
        try:
            call()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if implementation != COMPILED:
                raise
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise Unavailable(f"torch.compile: {reason.strip()[:200]}") from error
        self._lasts = now() - start

    def _time(self, call: Any) -> dict[str, Any]:
        """Take the times.

        Returns:
            "busy": the share of them in which this thread ran, on a CPU (others took the rest), else None. Of long
            calls on a CPU "matrix_meanwhile", FLOP/s of large products between them.
        """
        if self._lasts <= LONG:  # else once more would tell little and take much
            now = clock(self.device)
            start = now()
            call()
            self._lasts = now() - start
        if self.device.type != "cpu":
            self.benchmark.pedantic(call, setup=flusher(self.device), rounds=self._rounds(self._lasts))
            return {"busy": None}
        products, prepare = None, None
        if self._lasts > LONG:
            products = RateMeanwhile(self.precision, clock(self.device, self.processor))
            prepare = partial(products.sample, SAMPLED * self._lasts)
        start, ran = time.perf_counter(), time.thread_time()
        self.benchmark.pedantic(call, setup=prepare, rounds=self._rounds(self._lasts))
        found = {"busy": (time.thread_time() - ran) / (time.perf_counter() - start)}
        if products is None or prepare is None:
            return found
        prepare()
        return {**found, "matrix_meanwhile": products.rate}

    def _rounds(self, seconds: float) -> int:
        """Rounds of this pass, for a call that lasts so long."""
        least = FEW_ROUNDS if seconds > LONG or self.seconds < 0.1 else MIN_ROUNDS
        all_passes = min(max(int(self.seconds / max(seconds, 1e-7)), least), MAX_ROUNDS)
        return -(-all_passes // self.passes)
