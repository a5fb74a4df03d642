"""A step's time predicted from its work, against steps that an H200 measured."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pera_fast.config import load_config
from pera_fast.profile.cards import CARDS, card
from pera_fast.profile.predict import MEASURED, Efficiency, predictions, step_seconds
from pera_fast.profile.work import Row, Work
from pera_fast.train.flops import device_peak
from pera_kernels.cost import Cost

RESULTS = Path(__file__).parents[2] / "bench/results/gpu"
FITTED = ("16", "256")
FP8 = "64,model.teacher_precision=fp8"


def counted(commit: str) -> dict[str, Work]:
    """The work of a commit's steps, as record_step.py counted it."""
    data = json.loads(Path(__file__).with_name(f"step-{commit}.json").read_text(encoding="utf-8"))
    found = {}
    for step, rows in data["rows"].items():
        found[step] = work = Work()
        for *row, times in rows:
            work.rows[Row(*row)] += times
    return found


def timed(name: str, variants: dict[str, str]) -> dict[str, float]:
    """Measured milliseconds of steps, each with the variant that was measured."""
    rows = json.loads((RESULTS / name).read_text(encoding="utf-8"))["steps"]
    ours = {
        (str(row["batch"]), row["variant"]): row["ms"]
        for row in rows
        if row["what"] == "pera-fast" and row["recipe"] == "vit_b16"
    }
    return {step: ours[step.partition(",")[0], variant] for step, variant in variants.items()}


@pytest.fixture(scope="module")
def steps() -> dict[str, Work]:
    """Of fce4329."""
    return counted("fce4329")


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    """Of fce4329: with a graph up to batch 64, where the host is the limit without one."""
    variants = {step: "graph" if step in ("16", "64") else "as it comes" for step in ("16", "64", "128", "256", "512")}
    return timed("1-h200-fce4329.json", variants)


def milliseconds(work: Work, efficiency: Efficiency = MEASURED) -> float:
    """Predicted for an H200 with a CUDA graph."""
    return 1e3 * (step_seconds(work, card("H200"), True, efficiency) or 0)


def test_launches_of_a_step(steps: dict[str, Work]) -> None:
    """2941 in a trace of batch 64, memsets and copies among them."""
    assert steps["64"].total("launches") == pytest.approx(2941, rel=0.05)
    products = sum(times for row, times in steps["64"].rows.items() if row.kind == "products")
    assert products == pytest.approx(502, rel=0.02)


@pytest.mark.parametrize("step", ["16", "64", "128", "256", "512"])
def test_time_of_a_step(step: str, steps: dict[str, Work], measured: dict[str, float]) -> None:
    assert milliseconds(steps[step]) == pytest.approx(measured[step], rel=0.005 if step in FITTED else 0.15)


def test_a_later_commit_on_the_same_card() -> None:
    """Launches and times of 2d9b0ae, which has other kernels, another attention, fewer passes: nothing was fitted."""
    works, plain = counted("2d9b0ae"), "as it comes"
    with (RESULTS / "2-h200-2d9b0ae-kernels.csv").open(encoding="utf-8") as file:
        launches = sum(float(row["launches_per_step"]) for row in csv.DictReader(file))
    assert works["64"].total("launches") == pytest.approx(launches, rel=0.05)
    times = timed(
        "2-h200-2d9b0ae.json", {"16": plain, "64": plain, "256": plain, FP8: "model.teacher_precision=fp8"}
    )  # fmt: skip
    for step, time in times.items():
        assert milliseconds(works[step]) == pytest.approx(time, rel=0.15), step


def test_without_a_graph_the_host_is_the_limit_of_small_batches(steps: dict[str, Work]) -> None:
    """101.5 ms at batch 16, of which the GPU works a third."""
    assert step_seconds(steps["16"], card("H200"), graph=False) == pytest.approx(0.1015, rel=0.01)


def test_efficiencies_are_those_of_the_measurements(steps: dict[str, Work], measured: dict[str, float]) -> None:
    """Products and attention from kernels, two more from two steps: nothing else went into them."""
    h200 = card("H200")
    for kind, ms, share in (("products", 37.3, MEASURED.products), ("attention", 10.69, MEASURED.attention)):
        rows = [(row, times) for row, times in steps["64"].rows.items() if row.kind == kind]
        ideal = sum(times * row.flops / (h200.rate(row.dtype) or 0) for row, times in rows)
        assert share == pytest.approx(ideal * 1e3 / ms, abs=0.001)

    def off(passes: float, launch: float) -> np.ndarray:
        tried = replace(MEASURED, passes=passes, launch=launch)
        return np.array([milliseconds(steps[step], tried) - measured[step] for step in FITTED])

    values, ends = np.array([0.7, 4e-6]), np.array([0.001, 1e-8])
    for _ in range(8):  # Newton's method
        slopes = np.stack([(off(*(values + end)) - off(*values)) / end.sum() for end in np.diag(ends)], axis=1)
        values = values - np.linalg.solve(slopes, off(*values))
    assert values == pytest.approx([MEASURED.passes, MEASURED.launch], rel=0.003)


def test_what_was_timed_alone_is_taken_beside_what_it_stands_for() -> None:
    """H200, torch 2.11.0+cu130, 2026-11-26; TFLOP/s of the teacher's products by their share of FLOPs, microseconds."""
    shares = np.array([3, 1, 4, 4])  # qkv, projection, fc1, fc2
    half, fp8 = ((shares.sum() / (shares / rates).sum()) for rates in ([693, 651, 700, 737], [1040, 960, 1057, 1437]))
    ratio = fp8 / half * card("H200").half / (card("H200").fp8 or 0)
    assert MEASURED.fp8_products == pytest.approx(MEASURED.products * ratio, rel=0.003)
    # Twelve blocks of the teacher forward, of the student half with 158 tokens and half with 315, forward and backward.
    flash, cudnn = 12 * 396 + 6 * (87 + 304 + 171 + 578), 12 * 285 + 6 * (67 + 184 + 127 + 378)
    assert MEASURED.cudnn_attention == pytest.approx(MEASURED.attention * flash / cudnn, rel=0.003)
    alone = json.loads((RESULTS / "linear_gelu/2-h200-2d9b0ae.json").read_text(encoding="utf-8"))["us"]
    fused = min(time for name, time in alone.items() if name.startswith("fwd "))
    assert MEASURED.gelu_products == pytest.approx(MEASURED.products * alone["cublas"] / fused, rel=0.003)


def test_a_launch_takes_as_long_as_its_flops_or_its_bytes() -> None:
    made_up, h200 = Efficiency(0.5, 0.25, 0.2, 0.4, 0.1, 0.8, 1e-2, 1e-3), card("H200")

    def seconds(item: Cost, graph: bool = True) -> float:
        work = Work()
        work.add("passes", item)
        return step_seconds(work, h200, graph, made_up) or 0

    flops, second = h200.half * 0.5, round(0.8 * h200.bandwidth)  # a second of products, of passes
    assert seconds(Cost(1, 8, flops, "products")) == pytest.approx(1)
    assert seconds(Cost(1, 8, flops, "products", torch.float8_e4m3fn)) == pytest.approx(
        2 * h200.half / h200.rate("float8")
    )
    assert seconds(Cost(1, 8, flops, "gelu products")) == pytest.approx(2.5)
    assert seconds(Cost(1, 8, flops, "attention")) == pytest.approx(1.25)
    assert seconds(Cost(1, 8, flops, "cudnn attention")) == pytest.approx(5)
    assert seconds(Cost(1, second, 8, "products")) == pytest.approx(1)
    assert seconds(Cost(3, second)) == pytest.approx(1)
    assert seconds(Cost(3, 8)) == pytest.approx(0.03)
    assert seconds(Cost(3)) == 0  # memsets
    assert seconds(Cost(5000, second), graph=False) == pytest.approx(50)
    assert seconds(Cost(5000), graph=False) == pytest.approx(5)
    assert seconds(Cost(1, round(h200.link), kind="exchange")) == pytest.approx(1)


def test_cards_without_fp8_have_no_prediction_for_it() -> None:
    work = Work()
    work.add("products", Cost(1, 8, 1e12, "products", torch.float8_e4m3fn))
    found = predictions(work, work, load_config("vit_b16", ["train.batch_size=8"]))
    assert set(found) == {c.name for c in CARDS if c.fp8 is not None}
    assert found["RTX 4090"]["ms"] > found["H200"]["ms"]


def test_rates_are_those_of_the_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One peak for a card, whoever divides by it."""
    names = {"A100": "NVIDIA A100-SXM4-80GB", "H100": "NVIDIA H100 80GB HBM3", "H200": "NVIDIA H200"}
    names |= {"B200": "NVIDIA B200", "L40S": "NVIDIA L40S"}
    for short, name in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert device_peak(torch.device("cuda"), "bf16") == card(short).half
