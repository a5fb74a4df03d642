"""Options and the closing table of the benchmarks.

    pytest bench/ --recipe vit_b16 --images 8

Each benchmark runs an op as one training step of the recipe does and leaves in ``extra_info``: images, images_per_s,
gb_per_s (bytes that the op has to move, over the median time), of_copy (that, over the bandwidth of a large copy
measured in the same run) and error (largest difference from the reference in float64).
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pera_fast.config import Config, load_config


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pera-fast")
    group.addoption("--recipe", default="vit_b16", help="recipe whose crops, ratios and precision are used")
    group.addoption("--images", type=int, default=8, help="images per step")
    group.addoption("--device", default="cpu", help="device of the tensors")
    group.addoption("--copy-mib", type=int, default=512, help="size of the copy that measures the bandwidth")


@pytest.fixture(scope="session")
def cfg(request: pytest.FixtureRequest) -> Config:
    return load_config(request.config.getoption("--recipe"), [])


@pytest.fixture(scope="session")
def images(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--images")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@pytest.fixture(scope="session")
def copy_bandwidth(request: pytest.FixtureRequest, device: torch.device) -> float:
    """Bytes per second, read and written, of the fastest of several copies of a tensor larger than the caches."""
    source = torch.ones(request.config.getoption("--copy-mib") * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.numel() / min(seconds)


@dataclass
class Measure:
    """Times an op and leaves speed and error in the benchmark's extra_info."""

    benchmark: Any
    images: int
    device: torch.device
    copy_bandwidth: float

    def __call__(self, op: Callable[[], Tensor], *, expected: Tensor, moved: int) -> None:
        """Args: op, without arguments; expected: what it should give, float64; moved: bytes that it has to move."""

        def run() -> Tensor:
            result = op()
            synchronize(self.device)
            return result

        error = (run().double() - expected).abs().max().item() if expected.numel() else 0.0
        self.benchmark(run)
        info = self.benchmark.extra_info
        info.update(images=self.images, moved_bytes=moved, error=error)
        if self.benchmark.stats is not None:  # None under --benchmark-disable
            median = self.benchmark.stats.stats.median
            info["images_per_s"] = self.images / median
            info["gb_per_s"] = moved / median / 1e9
            info["of_copy"] = moved / median / self.copy_bandwidth


@pytest.fixture
def measure(benchmark: Any, images: int, device: torch.device, copy_bandwidth: float) -> Measure:
    return Measure(benchmark, images, device, copy_bandwidth)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [row for row in getattr(session, "benchmarks", []) if "images_per_s" in row.extra_info]
    if not rows:
        return
    chosen = torch.device(config.getoption("--device"))
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else _processor()
    terminalreporter.section(f"{config.getoption('--recipe')}, {config.getoption('--images')} images")
    terminalreporter.line(
        f"{name}, {torch.get_num_threads()} threads; torch {torch.__version__}, "
        f"Python {platform.python_version()}; commit {_commit()}"
    )
    terminalreporter.line(
        f"{'benchmark':<58}{'median ms':>11}{'IQR ms':>9}{'images/s':>11}{'GB/s':>8}{'of copy':>9}{'error':>10}"
    )
    for row in rows:
        info, stats = row.extra_info, row.stats
        terminalreporter.line(
            f"{row.name.removeprefix('test_'):<58}{stats.median * 1e3:>11.3f}{stats.iqr * 1e3:>9.3f}"
            f"{info['images_per_s']:>11.1f}{info['gb_per_s']:>8.3f}{info['of_copy']:>9.1%}{info['error']:>10.1e}"
        )
