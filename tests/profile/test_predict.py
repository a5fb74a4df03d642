"""A step's time predicted from its work, against steps that an H200 measured."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pera_fast.config import load_config
from pera_fast.profile.predict import MEASURED, Efficiency, predictions, step_seconds
from pera_fast.profile.work import Row, Work
from pera_fast.train.cards import CARDS, card
from pera_fast.train.flops import device_peak
from pera_kernels.cost import Cost

RESULTS = Path(__file__).parents[2] / "bench/results/gpu"
FITTED = ("16", "256")
FP8 = "64,model.teacher_precision=fp8"


def _timed_alone() -> tuple[float, float, float]:
    """Speeds beside what was in a step; H200, torch 2.11.0+cu130, 2026-11-26.

    Returns:
        Share of the FP8 rate over that of the bf16 rate, for the teacher's products.
        Time of a product with its GELU apart, by cuBLAS, over that of linear_gelu.
        Time of Flash-Attention 2 over that of cuDNN's attention.
    """
    shares = np.array([3, 1, 4, 4])  # FLOPs of qkv, projection, fc1, fc2; then TFLOP/s of each
    half, fp8 = ((shares.sum() / (shares / rates).sum()) for rates in ([693, 651, 700, 737], [1040, 960, 1057, 1437]))
    us = json.loads((RESULTS / "linear_gelu/2-h200-2d9b0ae.json").read_text(encoding="utf-8"))["us"]
    gelu = us["cublas"] / min(time for name, time in us.items() if name.startswith("fwd "))
    # Microseconds of twelve blocks: the teacher forward; half of the student with 158 tokens, half with 315, both ways.
    flash, cudnn = 12 * 396 + 6 * (87 + 304 + 171 + 578), 12 * 285 + 6 * (67 + 184 + 127 + 378)
    return fp8 / half * card("H200").half / (card("H200").fp8 or 0), gelu, flash / cudnn


FP8_FOR_HALF, GELU_FOR_PLAIN, CUDNN_FOR_FLASH = _timed_alone()


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
def first() -> dict[str, Work]:
    """Steps of fce4329, the first commit that was measured."""
    return counted("fce4329")


@pytest.fixture(scope="module")
def second() -> dict[str, Work]:
    """Steps of 2d9b0ae, with other kernels, another attention and fewer passes over memory."""
    return counted("2d9b0ae")


def first_times() -> dict[str, float]:
    """Measured for fce4329: with a graph up to batch 64, where the host is the limit without one."""
    variants = {step: "graph" if step in ("16", "64") else "as it comes" for step in ("16", "64", "128", "256", "512")}
    return timed("1-h200-fce4329.json", variants)


def second_times() -> dict[str, float]:
    """Measured for 2d9b0ae, whose default is a graph."""
    variants = dict.fromkeys(("16", "64", "256"), "as it comes") | {FP8: "model.teacher_precision=fp8"}
    return timed("2-h200-2d9b0ae.json", variants)


def milliseconds(work: Work, efficiency: Efficiency = MEASURED) -> float:
    """Predicted for an H200 with a CUDA graph."""
    return 1e3 * (step_seconds(work, card("H200"), True, efficiency) or 0)


def share(work: Work, kind: str, ms: float) -> float:
    """The share of the H200's matrix rate at which a class of work takes so many milliseconds."""
    rows = [(row, times) for row, times in work.rows.items() if row.kind == kind]
    return sum(times * row.flops / (card("H200").rate(row.dtype) or 0) for row, times in rows) * 1e3 / ms


def fit(steps: dict[str, Work], times: dict[str, float], known: Efficiency) -> Efficiency:
    """The efficiencies with passes and launch such that the steps of FITTED take their measured times."""

    def off(values: np.ndarray) -> np.ndarray:
        tried = replace(known, passes=float(values[0]), launch=float(values[1]))
        return np.array([milliseconds(steps[step], tried) - times[step] for step in FITTED])

    values, ends = np.array([0.6, 4e-6]), np.diag([0.001, 1e-8])
    for _ in range(10):  # Newton's method
        slopes = np.stack([(off(values + end) - off(values)) / end.sum() for end in ends], axis=1)
        values = values - np.linalg.solve(slopes, off(values))
    return replace(known, passes=float(values[0]), launch=float(values[1]))


def kernels(*names: str) -> tuple[float, float]:
    """Milliseconds and launches a step of 2d9b0ae's kernels at batch 64 whose names hold one of these."""
    with (RESULTS / "2-h200-2d9b0ae-kernels.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if any(name in row["kernel"].lower() for name in names)]
    return sum(float(row["ms_per_step"]) for row in rows), sum(float(row["launches_per_step"]) for row in rows)


def test_launches_of_a_step(first: dict[str, Work], second: dict[str, Work]) -> None:
    """2941 in a trace of batch 64 of fce4329, memsets and copies among them."""
    assert first["64"].total("launches") == pytest.approx(2941, rel=0.05)
    products = sum(times for row, times in first["64"].rows.items() if row.kind == "products")
    assert products == pytest.approx(502, rel=0.02)
    assert second["64"].total("launches") == pytest.approx(kernels("")[1], rel=0.05)


def test_time_of_a_step(second: dict[str, Work]) -> None:
    """Batch 64, with and without a teacher in FP8, was not fitted."""
    for step, ms in second_times().items():
        assert milliseconds(second[step]) == pytest.approx(ms, rel=0.005 if step in FITTED else 0.02), step


def test_steps_of_an_earlier_commit(first: dict[str, Work]) -> None:
    """At batch 16, of 2800 short kernels with 12 us each, the first commit was slower than its work says."""
    for step, ms in first_times().items():
        assert milliseconds(first[step]) == pytest.approx(ms, rel=0.21 if step == "16" else 0.15), step


def test_a_fit_holds_for_other_steps_and_for_a_later_commit(first: dict[str, Work], second: dict[str, Work]) -> None:
    """Shares and times from fce4329 alone, with two of its five steps: as they were before 2d9b0ae was measured."""
    products, attention = share(first["64"], "products", 37.3), share(first["64"], "attention", 10.69)
    alone = Efficiency(
        products, products * FP8_FOR_HALF, products * GELU_FOR_PLAIN, attention, attention * CUDNN_FOR_FLASH, 0.5, 0, 0
    )  # fmt: skip
    fitted = fit(first, first_times(), alone)
    for step, ms in first_times().items():
        assert milliseconds(first[step], fitted) == pytest.approx(ms, rel=0.005 if step in FITTED else 0.15), step
    for step, ms in second_times().items():
        assert milliseconds(second[step], fitted) == pytest.approx(ms, rel=0.15), step


def test_without_a_graph_the_host_is_the_limit_of_small_batches(first: dict[str, Work]) -> None:
    """101.5 ms at batch 16, of which the GPU works a third."""
    assert step_seconds(first["16"], card("H200"), graph=False) == pytest.approx(0.1015, rel=0.005)


def test_efficiencies_are_those_of_the_measurements(first: dict[str, Work], second: dict[str, Work]) -> None:
    """Shares from kernels, two more values from two steps: nothing else went into them."""
    assert MEASURED.products == pytest.approx(
        share(second["64"], "products", kernels("nvjet", "gemm", "gemv")[0]), abs=0.002
    )
    cudnn = kernels("cudnn_generated")[0]
    assert MEASURED.cudnn_attention == pytest.approx(share(second["64"], "cudnn attention", cudnn), abs=0.001)
    assert MEASURED.attention == pytest.approx(share(first["64"], "attention", 10.69), abs=0.001)
    fitted = fit(second, second_times(), MEASURED)
    assert [fitted.passes, fitted.launch] == pytest.approx([MEASURED.passes, MEASURED.launch], rel=0.005)


def test_what_was_timed_alone_is_taken_beside_what_it_stands_for() -> None:
    assert MEASURED.fp8_products == pytest.approx(MEASURED.products * FP8_FOR_HALF, rel=0.003)
    assert MEASURED.gelu_products == pytest.approx(MEASURED.products * GELU_FOR_PLAIN, rel=0.003)


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
    names |= {"B200": "NVIDIA B200", "L40S": "NVIDIA L40S", "RTX 4090": "NVIDIA GeForce RTX 4090"}
    assert set(names) == {one.name for one in CARDS}
    for short, name in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert device_peak(torch.device("cuda"), "bf16") == card(short).half
