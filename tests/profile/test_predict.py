"""A step's time predicted from its work, against steps that an H200 measured."""

import json
from pathlib import Path

import numpy as np
import pytest

from pera_fast.config import load_config
from pera_fast.profile.cards import CARDS, card
from pera_fast.profile.predict import MEASURED, Efficiency, gpu_seconds, predictions, step_seconds
from pera_fast.profile.work import Row, Work
from pera_fast.train.flops import device_peak
from pera_kernels.cost import Cost

ROOT = Path(__file__).parents[2]
FITTED = (16, 256)


@pytest.fixture(scope="module")
def steps() -> dict[int, Work]:
    """The work of a step of commit fce4329 by batch size, as record_step.py counted it."""
    data = json.loads(Path(__file__).with_name("step-fce4329.json").read_text(encoding="utf-8"))
    found = {}
    for batch, rows in data["rows"].items():
        found[int(batch)] = work = Work()
        for *row, times in rows:
            work.rows[Row(*row)] += times
    return found


@pytest.fixture(scope="module")
def measured() -> dict[int, float]:
    """Its milliseconds by batch size: with a graph up to 64, where the host is the limit without one."""
    data = json.loads((ROOT / "bench/results/gpu/1-h200-fce4329.json").read_text(encoding="utf-8"))
    variants = {16: "graph", 64: "graph", 128: "as it comes", 256: "as it comes", 512: "as it comes"}
    return {
        batch: next(
            s["ms"]
            for s in data["steps"]
            if s["what"] == "pera-fast" and s["recipe"] == "vit_b16" and (s["batch"], s["variant"]) == (batch, variant)
        )
        for batch, variant in variants.items()
    }


def test_launches_of_a_step(steps: dict[int, Work]) -> None:
    """2941 in a trace of batch 64, memsets and copies among them."""
    assert steps[64].total("launches") == pytest.approx(2941, rel=0.05)
    products = sum(times for row, times in steps[64].rows.items() if row.kind == "products")
    assert products == pytest.approx(502, rel=0.02)


@pytest.mark.parametrize("batch", [16, 64, 128, 256, 512])
def test_time_of_a_step(batch: int, steps: dict[int, Work], measured: dict[int, float]) -> None:
    seconds = step_seconds(steps[batch], card("H200"), graph=True)
    assert seconds is not None
    assert seconds * 1e3 == pytest.approx(measured[batch], rel=0.005 if batch in FITTED else 0.15)


def test_without_a_graph_the_host_is_the_limit_of_small_batches(steps: dict[int, Work]) -> None:
    """101.5 ms at batch 16, of which the GPU works a third."""
    assert step_seconds(steps[16], card("H200"), graph=False) == pytest.approx(0.1015, rel=0.01)


def test_efficiencies_are_those_of_the_measurements(steps: dict[int, Work], measured: dict[int, float]) -> None:
    """Products and attention from kernels, the other two from two steps: nothing else went into them."""
    h200 = card("H200")
    for kind, milliseconds, share in (
        ("products", 37.3, MEASURED.products),
        ("attention", 10.69, MEASURED.attention),
    ):
        rows = [(row, times) for row, times in steps[64].rows.items() if row.kind == kind]
        ideal = sum(times * row.flops / (h200.rate(row.dtype) or 0) for row, times in rows)
        assert share == pytest.approx(ideal * 1e3 / milliseconds, abs=0.001)
    unlimited = Efficiency(MEASURED.products, MEASURED.attention, 1e9, 0, 0)
    equations, right = [], []
    for batch in FITTED:
        everything = gpu_seconds(steps[batch], h200, MEASURED) or 0
        rows = steps[batch].rows.items()
        passes = sum(times * row.bytes for row, times in rows if row.kind == "passes") / h200.bandwidth
        assert everything > (gpu_seconds(steps[batch], h200, unlimited) or 0)
        equations.append([passes, steps[batch].total("launches")])
        right.append(measured[batch] / 1e3 - (everything - passes / MEASURED.passes))
    inverse, gap = np.linalg.solve(equations, right)
    assert 1 / inverse == pytest.approx(MEASURED.passes, rel=0.01)
    assert gap == pytest.approx(MEASURED.gap, rel=0.01)


def test_a_launch_takes_as_long_as_its_flops_or_its_bytes() -> None:
    even, h200 = Efficiency(0.5, 0.25, 0.8, 1e-6, 1e-3), card("H200")

    def seconds(item: Cost, graph: bool = True) -> float:
        work = Work()
        work.add("passes", item)
        return step_seconds(work, h200, graph, even) or 0

    flops = h200.half * 0.5  # a second of products
    assert seconds(Cost(1, 8, flops, "products")) == pytest.approx(1 + 1e-6)
    assert seconds(Cost(1, 8, flops, "attention")) == pytest.approx(2 + 1e-6)
    assert seconds(Cost(1, round(0.8 * h200.bandwidth), 8, "products")) == pytest.approx(1 + 1e-6)
    assert seconds(Cost(3, round(0.8 * h200.bandwidth))) == pytest.approx(1 + 3e-6)
    assert seconds(Cost(5000, 8), graph=False) == pytest.approx(5)
    assert seconds(Cost(1, round(h200.link), kind="exchange")) == pytest.approx(1 + 1e-6)


def test_cards_without_fp8_have_no_prediction_for_it() -> None:
    import torch

    work = Work()
    work.add("products", Cost(1, 8, 1e12, "products", torch.float8_e4m3fn))
    found = predictions(work, load_config("vit_b16", ["train.batch_size=8"]))
    assert set(found) == {c.name for c in CARDS if c.fp8 is not None}
    assert found["RTX 4090"]["ms"] > found["H200"]["ms"]


def test_rates_are_those_of_the_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One peak for a card, whoever divides by it."""
    import torch

    names = {"A100": "NVIDIA A100-SXM4-80GB", "H100": "NVIDIA H100 80GB HBM3", "H200": "NVIDIA H200"}
    names |= {"B200": "NVIDIA B200", "L40S": "NVIDIA L40S"}
    for short, name in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert device_peak(torch.device("cuda"), "bf16") == card(short).half
