"""Every bench runs on the CPU in seconds, and what it says of costs is what the ops' READMEs say."""

import io
import re
from pathlib import Path

import pytest
import torch
from ceilings_support import CEILINGS, write_ceilings
from rich.console import Console

from pera_bench.command import Wish, run
from pera_bench.point import Point
from pera_bench.record import Record
from pera_bench.selection import chosen_implementations, load, select
from pera_bench.suites import OPS, SUITES
from pera_bench.work import BOTH, FORWARD

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
NOTHING_SEEN = ("data", "crop_resize")  # another thread allocates, or the caller does
ONLY = "reference,chosen,pera-fast,triton"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """With ceilings in it, so that measuring them is not waited for."""
    write_ceilings(folder := tmp_path_factory.mktemp("cache"))
    return folder


@pytest.fixture(scope="module")
def measured(cache, tmp_path_factory) -> Record:
    """All suites as they run by default, in the sizes of the tiny recipe, and what cannot run here."""
    out = tmp_path_factory.mktemp("out")
    wish = Wish(device="cpu", recipes="tiny", images="2", only=ONLY, threads=1, seconds=0.002, passes=1)
    console = Console(width=170, record=True, file=io.StringIO())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        assert run(wish, json=None, old=None, out=out, console=console) == 0, console.export_text()
    assert (out / "bench.png").stat().st_size > 10_000
    text = console.export_text()
    assert all(f"{name}/" in text for name in SUITES)
    return Record.load(out / "bench.json")


@pytest.mark.parametrize("suite", SUITES)
def test_suite_measures(measured, suite):
    rows = [row for row in measured.rows if row["suite"] == suite]
    assert {(row["case"], row["direction"]) for row in rows} == {
        (case, direction) for _, case in select("step/cheap" if suite == "step" else suite)
        for direction in load(suite).CASES[case]
    }  # fmt: skip
    for row in rows:
        assert 0 < row["min_s"] <= row["q1_s"] <= row["median_s"] <= row["q3_s"] <= row["max_s"]
        assert row["rounds"] >= 3
        assert row["error"] is None or row["error"] < 1e-4
        assert suite in NOTHING_SEEN if row["peak_mib"] is None else row["peak_mib"] > 0
    if suite in OPS:
        assert {row["implementation"] for row in rows} > {"reference"}
        assert all("of_copy" in row and row["speedup"] > 0 and row["error"] is not None for row in rows)


def test_machine_is_described(measured):
    machine = measured.machine
    assert (machine["kind"], machine["threads"], machine["pinned"]) == ("cpu", 1, True)
    assert machine["torch"] == torch.__version__
    assert machine["commit"]
    assert measured.ceilings == CEILINGS
    row = next(row for row in measured.rows if row["suite"] == "attention")
    assert row["of_copy"] == pytest.approx(row["moved_bytes"] / row["median_s"] / 1e10)
    assert row["of_matrix"] == pytest.approx(row["flops"] / row["median_s"] / 1e11)


def test_what_cannot_run_is_left_out_with_the_reason(measured):
    triton = [entry for entry in measured.skipped if " triton," in entry["bench"]]
    assert {entry["bench"].partition("/")[0] for entry in triton} == set(OPS) - {
        "koleo",
        "query_attention",
        "cls_attention",
        "transposed",
    }
    assert {entry["reason"] for entry in triton} == {"Triton kernels run on a GPU, not on cpu"}
    assert len(measured.rows) + len(measured.skipped) == measured.benches


def test_a_bench_is_measured_in_several_passes(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    few = {"recipes": "tiny", "images": "2", "only": "reference,triton", "threads": 1, "seconds": 0.002}
    wish = Wish(["mask_tokens"], device="cpu", passes=3, **few)
    console = Console(file=io.StringIO())
    assert run(wish, json=tmp_path / "r.json", old=None, out=None, console=console) == 0
    record = Record.load(tmp_path / "r.json")
    assert [len(row["passes_s"]) for row in record.rows] == [3, 3]
    assert all(row["rounds"] >= 3 for row in record.rows)
    assert len(record.rows) + len(record.skipped) == record.benches / 3


def test_list_of_suites_is_the_folder():
    files = {path.stem for path in (ROOT / "bench" / "pera_bench" / "suites").glob("*.py")}
    assert set(SUITES) == files - {"__init__", "colors"}
    folders = {path.parent.name for path in (ROOT / "kernels" / "pera_kernels").glob("*/op.py")}
    assert folders <= {*OPS, "adamw_ema"}, "which the suite `update` measures"


def test_every_implementation_of_an_op_has_a_row():
    assert chosen_implementations("attention", CPU, "all") == [
        "reference", "compiled", "triton", "amx", "avx512_bf16", "cudnn", "xformers", "varlen", "sdpa",
    ]  # fmt: skip
    assert chosen_implementations("koleo", CPU) == ["reference", "chosen"]
    assert chosen_implementations("koleo", CPU, "triton,native") == ["native"]
    assert chosen_implementations(("reference", "a", "pera-fast"), CPU) == ["reference", "pera-fast"]
    assert chosen_implementations(("reference", "a", "pera-fast"), CPU, "a,b") == ["a"]


# suite/case, direction, what one image of vit_b16 costs in bf16: (bytes, FLOPs) as the README of the op states them
STATED = [
    ("attention/teacher", FORWARD, (6.9e6, 1.38e9)),
    ("attention/student_late", FORWARD, (2.9e6, 0.43e9)),
    ("embed_tokens/global", FORWARD, (2 * 0.48e6, 0.37e9)),
    ("mask_tokens/global", FORWARD, (2.4e6, 0)),
    ("sequence_norm/subset", FORWARD, (1.5e6, 0)),
    ("sequence_add/subset", FORWARD, (2.9e6, 0)),
    ("add_norm/all", FORWARD, (4 * 1.07e6, 0)),
    ("add_norm/subset", FORWARD, (3.4 * 1.07e6, 0)),
    ("add_norm/subset", BOTH, ((3.4 + 4.1) * 1.07e6, 0)),
    ("gelu/teacher", FORWARD, (2 * 6.9e6, 0)),
    ("add_norm_fp8/teacher", FORWARD, (3 * 1.73e6 + 0.86e6, 0)),
    ("gelu_fp8/teacher", FORWARD, (6.9e6 + 3.5e6, 0)),
    ("quantize_rows/teacher", FORWARD, (1.73e6 + 0.86e6, 0)),
    ("distillation_loss/all", FORWARD, (403e6 / 16, 2.0e9)),
    ("distillation_loss/all", BOTH, (1007e6 / 16, 6.0e9)),
    ("koleo/global", FORWARD, (403e6 / 16, 0.8e9)),
    ("pixel_loss/color", FORWARD, (0.72e6, 0)),
    ("pixel_loss/color", BOTH, (1.93e6, 0)),
]


@pytest.mark.parametrize(("bench", "direction", "stated"), STATED)
def test_costs_are_those_of_the_readmes(bench, direction, stated):
    ((suite, case),) = select(bench)
    made = load(suite).make(Point("vit_b16", 16, "bf16", CPU), case)
    cost = made.run(direction, "chosen").cost
    assert (cost.moved / 16, cost.flops / 16) == pytest.approx(stated, rel=0.05)


def test_readmes_name_benches_that_exist():
    ops = (ROOT / "kernels" / "pera_kernels").glob("*/README.md")
    for page in [ROOT / "README.md", ROOT / "docs" / "bench.md", *ops]:
        for names in re.findall(r"`?pera-fast bench((?: [a-z_/][a-z_/0-9]*)+)", page.read_text(encoding="utf-8")):
            select(names.strip().replace(" ", ","))
