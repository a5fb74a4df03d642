"""The runner: pytest collects the benches that were asked for, pytest-benchmark times them, rows go to a file.

`pera-fast bench` calls it; its options are those of the command.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from pera_bench.ceilings import ceilings
from pera_bench.machine import describe
from pera_bench.measure import Measure
from pera_bench.point import Point
from pera_bench.rows import RowWriter
from pera_bench.selection import chosen_implementations, load, select
from pera_bench.timing import clock
from pera_fast.train.host_memory import reuse_freed_memory

CEILINGS: pytest.StashKey[dict[str, float]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pera-fast")
    group.addoption("--suites", default="", help="suites or suite/case, separated by commas")
    group.addoption("--recipes", default="vit_b16", help="recipes, separated by commas")
    group.addoption("--images", default="8", help="images per step, separated by commas")
    group.addoption("--precision", default="fp32", help="bf16, fp16 or fp32")
    group.addoption("--device", default="cpu", help="device of the tensors")
    group.addoption("--threads", type=int, default=0, help="threads of the CPU; 0: torch's own number")
    group.addoption("--only", default="", help="implementations, separated by commas, or all")
    group.addoption("--seconds", type=float, default=0.5, help="time for the rounds of one bench")
    group.addoption("--processor-time", action="store_true", help="of all threads, on a CPU")
    group.addoption("--remeasure", action="store_true", help="measure the ceilings again")
    group.addoption("--rows", type=Path, default=None, help="file for the rows, one JSON object a line")


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if threads := option.threads:
        torch.set_num_threads(threads)
    reuse_freed_memory()  # as in training
    device = torch.device(option.device)
    how = {"processor": option.processor_time, "remeasure": option.remeasure}
    config.stash[CEILINGS] = found = ceilings(device, option.precision, **how)
    if (path := option.rows) is not None:
        config.pluginmanager.register(
            RowWriter(path, {"machine": describe(device, option.processor_time), "ceilings": found})
        )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a row; those of one case and point follow each other and share what is made for them."""
    option, rows, ids = metafunc.config.option, [], []
    device = torch.device(option.device)
    for recipe, images in product(option.recipes.split(","), map(int, option.images.split(","))):
        point = Point(recipe, images, option.precision, device)
        for suite, case in select(option.suites):
            module = load(suite)
            names = chosen_implementations(module.IMPLEMENTATIONS, device, option.only)
            for direction, name in product(module.CASES[case], names):
                rows.append((point, suite, case, direction, name))
                ids.append(f"{suite}/{case} {direction} {name}, {recipe}, {images} images")
    metafunc.parametrize(("point", "suite", "case", "direction", "implementation"), rows, ids=ids)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    timer = clock(torch.device(config.option.device), config.option.processor_time)
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=timer, disable_gc=True))


@pytest.fixture
def measure(benchmark: Any, point: Point, request: pytest.FixtureRequest) -> Measure:
    return Measure(benchmark, point.device, request.config.option.seconds, request.config.stash[CEILINGS])
