"""Records of measurements: from the runner's lines, to a file and back, compared, and in the README's tables."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from pera_bench.record import Record, compare
from pera_bench.show import show, show_changes
from pera_fast.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {
    "device": "Chip", "kind": "cpu", "threads": 2, "cpu_capability": "AVX2", "torch": "2.0", "python": "3.12",
    "commit": "abc", "date": "2026-01-02 03:04 UTC",
}  # fmt: skip


def row(implementation: str, median: float, spread: float = 0.1, **other) -> dict:
    half = median * spread / 2
    times = {"median_s": median, "q1_s": median - half, "q3_s": median + half, "min_s": median / 2, "max_s": 2 * median}
    named = {"suite": "koleo", "case": "global", "direction": "forward", "recipe": "tiny", "images": 2}
    shares = {"of_copy": 0.5, "of_matrix": 0.25, "moved_bytes": 1, "flops": 1}
    rest = {
        "precision": "fp32",
        "implementation": implementation,
        "rounds": 5,
        "error": 1e-6,
        "peak_mib": 1.0,
        "busy": 0.98,
    }
    return {**named, **rest, **times, **shares, **other}


def record(*rows: dict, **machine) -> Record:
    made = Record({**MACHINE, **machine}, {"copy": 1e10, "matrix": 1e12}, list(rows))
    made.add_speedups()
    return made


def printed(function, *args) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    function(*args, console)
    return console.export_text()


def test_speedup_is_over_the_reference_of_the_same_bench():
    made = record(row("reference", 4.0), row("native", 1.0), row("native", 9.0, images=4))
    assert [r["speedup"] for r in made.rows] == [1.0, 4.0, None]


def test_lines_of_an_unfinished_run_are_read():
    lines = [
        {"machine": MACHINE, "ceilings": {"copy": 1.0, "matrix": 1.0}}, {"benches": 4}, {"row": row("reference", 2.0)},
        {"skipped": "b", "reason": "r"}, {"failed": "c", "reason": "s"},
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    made = Record.from_lines(text + '{"row": {"sui')
    assert (made.benches, len(made.rows)) == (4, 1)
    assert made.skipped == [{"bench": "b", "reason": "r"}]
    assert made.failed == [{"bench": "c", "reason": "s"}]
    assert Record.from_lines("") is None
    assert Record.from_lines('{"machine"') is None


def test_other_processes_are_noticed():
    rows = [row("reference", 2.0, busy=0.5), row("native", 2.0, busy=0.6), row("native", 2.0, busy=0.1, suite="data")]
    made = record(*rows)
    assert made.undisturbed == 0.55
    assert "other processes took 45% of the time" in printed(show, made)
    assert record(row("native", 1.0, busy=None)).undisturbed == 1.0
    assert "other processes" not in printed(show, record(row("native", 1.0)))


def test_file_and_back(tmp_path):
    made = record(row("reference", 2.0))
    made.save(tmp_path / "deep" / "r.json")
    assert Record.load(tmp_path / "deep" / "r.json") == made
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="is not a file that pera-fast bench --json wrote"):
        Record.load(tmp_path / "other.json")
    with pytest.raises(UserError, match="cannot be read"):
        Record.load(tmp_path / "none.json")


def test_what_moved_is_beyond_both_spreads():
    old = record(row("reference", 1.0, 0.1), row("native", 1.0, 0.1), row("chunked", 1.0, 0.5))
    new = record(row("native", 0.5, 0.1), row("reference", 1.15, 0.1), row("chunked", 1.4, 0.5), row("triton", 1.0))
    moved = {change.row["implementation"]: change.moved for change in compare(new, old)}
    assert moved == {"native": True, "reference": False, "chunked": False}
    text = printed(show_changes, compare(new, old), new, old)
    assert "1 of 3 benches moved" in text
    assert "0.50" in text
    assert "not alike" not in text
    other = record(device="Other")
    assert "device Other then, Chip now" in printed(show_changes, compare(new, other), new, other)


def test_table_says_what_was_measured_and_what_was_left_out():
    made = record(row("reference", 4e-3), row("native", 1e-3))
    made.skipped = [{"bench": f"koleo/global {d} triton, tiny, 2 images", "reason": "no GPU"} for d in ("a", "b")]
    made.failed = [{"bench": "koleo/local", "reason": "wrong by 3"}]
    text = printed(show, made)
    for said in ("1 ms", "4.00x", "50%", "25%", "5.0", "2 threads", "commit abc", "tiny, 2 images, fp32"):
        assert said in text
    assert "left out: triton (2 benches): no GPU" in text
    assert "failed: koleo/local: wrong by 3" in text


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("report", ROOT / "bench" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_report_of_a_folder(report, tmp_path):
    step = {"suite": "step", "case": "none", "direction": "step", "error": None}
    record(row("reference", 4e-3), row("native", 1e-3)).save(tmp_path / "ops.json")
    record(row("pera-fast", 2.0, **step), row("published", 5.0, **step)).save(tmp_path / "step.json")
    text = report.section(tmp_path)
    assert text.startswith("Nothing has been measured on a GPU yet.")
    assert "| koleo, global | forward | native | 1 (10%) | 4 | 4.00 | 50% | 25% | 1e-06 |" in text
    assert "batch 2, fp32, recompute none | 1 | 2 (1 to 4) | 1 | 0.4 | 2.50 | abc, 2026-01-02 |" in text
    of_card = record(row("triton", 1e-3), kind="cuda", device="Card")
    parts = [{"results": {"bench": asdict(of_card)}}, {"results": {"ceilings": {"found": {}}}}]
    (tmp_path / "gpu.json").write_text(json.dumps({"parts": parts}))
    assert "Nothing" not in report.section(tmp_path)
    assert "Other processes" not in report.section(tmp_path)
    record(row("native", 1.0, busy=0.5)).save(tmp_path / "loud.json")
    assert "Other processes took 50% of the time." in report.section(tmp_path)
    assert "Card, torch 2.0; abc" in report.section(tmp_path)
