"""Runs the benchmarks: pytest collects those that were asked for, pytest-benchmark times them, rows go to a file.

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
from pera_bench.record import LATER_PASS
from pera_bench.rows import RowWriter
from pera_bench.selection import chosen_implementations, load, select
from pera_bench.timing import clock
from pera_fast.train.host_memory import reuse_freed_memory


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
    group.addoption("--passes", type=int, default=1, help="over all benches")
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
    found = ceilings(device, option.precision, **how)
    if (path := option.rows) is not None:
        head = {"machine": describe(device, option.processor_time), "ceilings": found}
        config.pluginmanager.register(RowWriter(path, head))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a row and pass; those of one case and point follow each other and share what is made for them."""
    option, rows, ids = metafunc.config.option, [], []
    device = torch.device(option.device)
    points = list(product(option.recipes.split(","), option.images.split(",")))
    for number, (recipe, images) in product(range(1, option.passes + 1), points):
        point = Point(recipe, int(images), option.precision, device)
        for suite, case in select(option.suites):
            module = load(suite)
            names = chosen_implementations(module.IMPLEMENTATIONS, device, option.only)
            for direction, name in product(module.CASES[case], names):
                rows.append((number, point, suite, case, direction, name))
                later = f"{LATER_PASS}{number}" if number > 1 else ""
                ids.append(f"{suite}/{case} {direction} {name}, {recipe}, {images} images{later}")
    metafunc.parametrize(("number", "point", "suite", "case", "direction", "implementation"), rows, ids=ids)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    timer = clock(torch.device(config.option.device), config.option.processor_time)
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=timer, disable_gc=True))


@pytest.fixture
def measure(benchmark: Any, number: int, point: Point, request: pytest.FixtureRequest) -> Measure:
    option = request.config.option
    how = {"first": number == 1, "processor": option.processor_time}
    return Measure(benchmark, point.device, point.precision, option.seconds, option.passes, **how)
