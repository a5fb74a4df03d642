"""Measuring: times, memory, errors and ceilings."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

from pera_bench import ceilings, measure
from pera_bench.point import Point, nbytes
from pera_bench.timing import Memory, clock
from pera_bench.work import BOTH, COMPILED, FORWARD, Cost, Unavailable, Whole, Work, relative_error

CPU = torch.device("cpu")


def test_memory_counts_temporaries_and_what_stays():
    x = torch.zeros(2**18)  # 1 MiB
    with Memory(CPU) as memory:
        y = (x + 1) * 2 + (x + 3)
    assert memory.left == nbytes(y)
    assert 2 * nbytes(x) <= memory.peak <= 3 * nbytes(x) + 2**10


def test_clock_gives_seconds():
    now = clock(CPU)
    start = now()
    torch.randn(1000, 1000).sum()
    assert 0 < now() - start < 10


def test_processor_time_leaves_out_what_others_take():
    now = clock(CPU, processor=True)
    start = now()
    time.sleep(0.3)
    assert now() - start < 0.2


def test_error_is_relative_to_the_largest_value_and_of_the_worst_result():
    exact = [torch.tensor([1.0, -4.0]).double(), torch.zeros(2).double(), torch.ones(0).double()]
    got = [torch.tensor([1.0, -3.0]), torch.tensor([0.0, 0.125]), torch.ones(0)]
    assert relative_error(got, exact) == 0.25


@pytest.fixture
def square() -> Work:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    return Work(None, lambda x, p: x**p + 1e-3, lambda x, p: x**p, (x, 2), (0,), Cost(10, 20), Cost(1, 2))


def test_work_gives_cost_and_error_of_values_and_gradients(square):
    forward, both = square.run(FORWARD, "any"), square.run(BOTH, "any")
    assert (forward.cost, both.cost) == (Cost(10, 20), Cost(11, 22))
    assert forward.error() == pytest.approx(1e-3 / (square.arguments[0] ** 2).max().item(), rel=1e-3)
    assert both.error() < 1e-6  # the gradient of what is added is zero
    assert not forward.call()[0].requires_grad
    assert square.run(FORWARD, "reference").error() < 1e-6


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="Inductor's C++ does not compile where torch is held to no vector units",
)
def test_the_definition_is_compiled(square):
    assert square.run(FORWARD, COMPILED).error() < 1e-6


def test_what_cannot_be_compiled_is_left_out(square):
    square.compiles = "it reads on the host"
    with pytest.raises(Unavailable, match="it reads on the host"):
        square.run(FORWARD, COMPILED)


def test_ceilings_are_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 2**22)
    monkeypatch.setitem(ceilings.SIDE, "cpu", 128)
    found = ceilings.ceilings(CPU, "fp32")
    assert found["copy"] > 1e8
    assert found["matrix"] > 1e8
    path = ceilings.cache_path(CPU, "fp32")
    path.write_text(json.dumps({"copy": 1.0, "matrix": 2.0}))
    assert ceilings.ceilings(CPU, "fp32") == {"copy": 1.0, "matrix": 2.0}
    assert ceilings.ceilings(CPU, "fp32", remeasure=True)["copy"] > 1e8
    path.write_text("not JSON")
    assert ceilings.ceilings(CPU, "fp32")["copy"] > 1e8
    assert len({path, ceilings.cache_path(CPU, "bf16"), ceilings.cache_path(CPU, "fp32", processor=True)}) == 3


def test_the_rate_meanwhile_is_of_products_by_the_given_clock(monkeypatch):
    monkeypatch.setitem(ceilings.SIDE, "cpu", 100)
    ticks = iter(range(100))
    products = ceilings.RateMeanwhile("fp32", lambda: next(ticks))  # each reading a second after the one before
    products.sample(2.5)
    assert (products.seconds, products.flops) == (3, 3 * 2 * 100**3)
    products.sample(0.0)
    assert products.seconds == 4
    assert products.rate == 2 * 100**3


class Timer:
    """pytest-benchmark's fixture, as far as it is used."""

    stats = SimpleNamespace(stats=SimpleNamespace(data=[1.0]))

    def pedantic(self, call, setup, rounds: int) -> None:
        for _ in range(rounds):
            if setup is not None:
                setup()
            call()


@pytest.mark.parametrize("long", [True, False])
def test_long_calls_on_a_cpu_measure_the_rate_meanwhile(long: bool, monkeypatch):
    monkeypatch.setitem(ceilings.SIDE, "cpu", 100)
    monkeypatch.setattr(measure, "LONG", 0.01)
    calls = []
    made = Whole({"ours": lambda: lambda: (calls.append(1), time.sleep(0.02 if long else 0.0))}, Cost(flops=8))
    found = measure.Measure(Timer(), CPU, "bf16", 0.0)(made, "step", "ours")
    assert ("matrix_meanwhile" in found) == long
    assert 0 < found.get("matrix_meanwhile", 1) < 1e14
    assert len(calls) == (2 if long else 3) + measure.FEW_ROUNDS


def test_point_has_the_shapes_of_a_step():
    point = Point("vit_b16", 8, "bf16", CPU)
    assert point.groups("student") == [16, 158, 64, 8]
    assert point.groups("student_late") == [16, 315, 64, 8]
    assert point.groups("teacher_local") == [64, 23]
    keep, kept = point.keep([16, 315, 64, 8])
    assert kept == [11, 44]
    assert keep.dtype == torch.int32
    assert len(keep) == 55
    index = point.index("global", "student")
    assert index.shape == (16, 157)
    assert (index[:, 1:] > index[:, :-1]).all()
