"""Clocks for pytest-benchmark, and the memory that a call takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

FLUSH_BYTES = 2**28  # written between calls: more than any L2 cache holds


class Instant:
    """A moment on the CUDA stream. The difference of two is in seconds, and waits until the later one has come."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Instant) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def clock(device: torch.device, processor: bool = False) -> Callable[[], Any]:
    """A timer whose readings can be subtracted: events on a GPU, the host's monotonic clock elsewhere.

    Args:
        processor: on a CPU, the time that all threads of this process ran instead: of one thread, what other processes
            take does not count.
    """
    if device.type == "cuda":
        return Instant
    return time.process_time if processor else time.perf_counter


def flusher(device: torch.device) -> Callable[[], None]:
    """Function to call before each timed call: on a GPU it overwrites the L2 cache.

    It waits for nothing. The device is busy with it for some 0.2 ms, in which the host runs ahead and launches what is
    timed, so that short kernels are timed and not their launches.
    """
    if device.type != "cuda":
        return lambda: None
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def flush() -> None:
        for _ in range(4):
            scratch.zero_()

    return flush


class Memory:
    """Measures what is allocated on the device inside the block.

    Attributes:
        peak: most bytes alive at once, beyond those alive before.
        left: bytes alive at the end, beyond those alive before.
    """

    peak = left = 0

    def __init__(self, device: torch.device):
        self._device = device
        self._profile: Any = None

    def __enter__(self) -> Memory:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            cpu = torch.profiler.ProfilerActivity.CPU
            self._profile = torch.profiler.profile(activities=[cpu], profile_memory=True, acc_events=True)
            self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._profile is None:
            torch.cuda.synchronize(self._device)
            self.peak = torch.cuda.max_memory_allocated(self._device) - self._before
            self.left = torch.cuda.memory_allocated(self._device) - self._before
            return
        self._profile.__exit__(*error)
        events = self._profile.profiler.kineto_results.events()
        # PyTorch's CPU allocator reports each allocation and each release, also those of compiled kernels.
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        for _, change in changes:
            self.left += change
            self.peak = max(self.peak, self.left)
