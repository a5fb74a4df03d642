"""Records of measurements: from the runner's lines, to a file and back, compared, and in the README's tables."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from pera_bench.record import Record, compare, spread, summarise
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


def timed(times: list[float], number: int = 1, asked: str = "native", **other) -> dict:
    """What the runner writes of a bench in one pass."""
    kept = ("suite", "case", "direction", "recipe", "images", "precision", "busy")
    made = {name: value for name, value in row("native", 1.0).items() if name in kept}
    found = {"error": 1e-6, "peak_mib": 1.0} if number == 1 else {}
    costs = {"moved_bytes": 6, "flops": 0}
    return {
        **made,
        **costs,
        **found,
        "implementation": "native",
        "asked": asked,
        "pass": number,
        "times_s": times,
        **other,
    }


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
        {"machine": MACHINE, "ceilings": {"copy": 1.0, "matrix": 1.0}}, {"benches": 4}, {"row": timed([2.0])},
        {"skipped": "b", "reason": "r"}, {"skipped": "b, pass 2", "reason": "r"}, {"failed": "c", "reason": "s"},
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    made = Record.from_lines(text + '{"row": {"sui')
    assert (made.benches, len(made.rows)) == (4, 1)
    assert made.skipped == [{"bench": "b", "reason": "r"}]
    assert made.failed == [{"bench": "c", "reason": "s"}]
    assert Record.from_lines("") is None
    assert Record.from_lines('{"machine"') is None


def test_passes_make_one_row():
    measured = [timed([1.0, 2.0, 3.0]), timed([9.0], asked="chosen"), timed([4.0, 5.0, 3.0], 2), timed([7.0], images=4)]
    found = summarise(measured, {"copy": 4.0, "matrix": 1.0})
    first, chosen, other = found
    assert (first["median_s"], first["min_s"], first["max_s"], first["rounds"]) == (3.0, 1.0, 5.0, 6)
    assert (first["q1_s"], first["q3_s"]) == (2.25, 3.75)
    assert first["passes_s"] == [2.0, 4.0]
    assert (first["of_copy"], first["error"], first["peak_mib"]) == (0.5, 1e-6, 1.0)
    assert "of_matrix" not in first
    assert not {"asked", "pass", "times_s"} & first.keys()
    assert (chosen["median_s"], other["images"], other["rounds"]) == (9.0, 4, 1)
    rates = {"flops": 12, "matrix_meanwhile": 4.0}, {"flops": 12, "matrix_meanwhile": 12.0}
    (shared,) = summarise([timed([1.0, 5.0]) | rates[0], timed([3.0], 2) | rates[1]], {"copy": 4.0, "matrix": 100.0})
    assert shared["of_matrix"] == pytest.approx(12 / 3.0 / 6.0)  # of the harmonic mean: as long in each
    (moves,) = summarise([timed([1.0]) | {"matrix_meanwhile": 4.0}], {"copy": 4.0, "matrix": 100.0})
    assert "of_matrix" not in moves  # it has no products
    (late,) = summarise([timed([1.0], 2)], {"copy": 4.0, "matrix": 1.0})  # the first pass had failed
    assert "1 s" in printed(show, record(late))


def test_spread_is_of_the_calls_or_between_the_passes():
    assert spread(row("native", 1.0, 0.1)) == pytest.approx(0.1)
    assert spread(row("native", 1.0, 0.1, passes_s=[1.0, 0.96])) == pytest.approx(0.1)
    assert spread(row("native", 1.0, 0.1, passes_s=[1.3, 1.0, 0.9])) == pytest.approx(0.4)


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


STEP = {"suite": "step", "case": "cheap", "direction": "step", "error": None}


def test_page_of_a_folder(report, tmp_path):
    record(row("reference", 4e-3), row("native", 1e-3)).save(tmp_path / "ops.json")
    theirs = row("published", 5.0, **STEP | {"peak_mib": 4.0})
    ours = row("pera-fast", 2.0, **STEP | {"of_matrix": 0.8, "matrix_meanwhile": 1e12})
    record(ours, theirs).save(tmp_path / "step.json")
    text = report.page(tmp_path)
    assert "Nothing has been measured on a GPU yet" in text
    assert "| koleo, global | forward | native | 1 (10%) | 4 | 4.00 | 50% | 25% | 1e-06 |" in text
    assert (
        "batch 2, fp32, recompute cheap | 1 | 2 (1 to 4) | 80% * (25%) | 1 | 0.4 | 2.50 | 4 | abc, 2026-01-02 |" in text
    )
    of_card = record(row("triton", 1e-3), kind="cuda", device="Card")
    parts = [{"results": {"bench": asdict(of_card)}}, {"results": {"ceilings": {"found": {}}}}]
    (tmp_path / "gpu.json").write_text(json.dumps({"parts": parts}))
    assert "Nothing" not in report.page(tmp_path)
    assert "Other processes" not in report.page(tmp_path)
    record(row("native", 1.0, busy=0.5)).save(tmp_path / "loud.json")
    assert "Other processes took 50% of the time." in report.page(tmp_path)
    assert "Card, torch 2.0; abc" in report.page(tmp_path)


def summary(report, folder: Path) -> str:
    return report.summary(report.load(folder), folder)


def test_summary_of_ops_and_steps(report, tmp_path):
    at = {"recipe": "vit_b16"}
    pairs = [row(name, median, direction=way, **at) for way in ("forward", "forward+backward")
             for name, median in (("reference", 4e-3), ("native", 1e-3 if way == "forward" else 5e-3))]  # fmt: skip
    other = [row(name, median, case="local", **at) for name, median in (("reference", 60e-3), ("native", 1e-3))]
    tiny = [row("reference", 9e-3), row("native", 1e-3)]
    record(*pairs, *other, *tiny).save(tmp_path / "ops.json")
    text = summary(report, tmp_path)
    assert text.startswith("**Nothing has been measured on a GPU yet**")
    assert "| koleo | native | 4.00 to 60.0 | 0.80 |" in text  # what is slower is said too
    assert "vit_b16, 2 images, fp32; Chip, 2 threads, AVX2, torch 2.0; abc, 2026-01-02." in text
    assert "under torch.compile" in text
    assert "training step" not in text
    compiled = [row("compiled", 2e-3, **at), row("compiled", 3e-3, direction="forward+backward", **at)]
    record(*pairs, *other, *compiled).save(tmp_path / "ops.json")
    text = summary(report, tmp_path)
    assert "| koleo | native | 4.00 to 60.0 | 0.80 | 2.00 | 1.33 |" in text
    assert "under torch.compile" not in text
    record(*pairs, *other, *tiny).save(tmp_path / "ops.json")  # compiled in a run of its own, without the definition
    record(*compiled, row("compiled", 1e-3, case="unknown", **at)).save(tmp_path / "of_ops_compiled.json")
    assert "| koleo | native | 4.00 to 60.0 | 0.80 | 2.00 | 1.33 |" in summary(report, tmp_path)
    assert "| koleo, global | forward | compiled | 2 (10%) | |" in report.page(tmp_path)
    sizes = [row(name, median, **STEP | {"images": images, "precision": "bf16"})
             for images in (2, 4) for name, median in (("pera-fast", 2.0), ("published", 5.0 * images))]  # fmt: skip
    alone = row("pera-fast", 2.0, **STEP | {"images": 8, "precision": "bf16"})
    record(*sizes, alone).save(tmp_path / "step.json")
    text = summary(report, tmp_path)
    (line,) = (line for line in text.splitlines() if "batch" in line and line.startswith("| tiny"))
    assert line == "| tiny, batch 4, bf16, AVX2, 2 threads | 2 | 0.2 | 10.00 | 1 | 1 | 1.00 |"
    assert "emulates bf16 products and ours makes them in float32. A step in float32 is not" in " ".join(text.split())
    record(row("pera-fast", 1.0, **STEP), row("published", 2.0, **STEP)).save(tmp_path / "full.json")
    text = " ".join(summary(report, tmp_path).split())
    assert "| tiny, batch 2, fp32, AVX2, 2 threads | 2 | 1 | 2.00 | 1 | 1 | 1.00 |" in text
    assert "emulates bf16" in text
    assert "In fp32 both make them in float32." in text.partition("**Ops**")[0]


def test_summary_of_loaders_and_memory(report, tmp_path):
    def sides(cores, *rates):
        found = ({"images_per_core_s": rate, "images_per_s": rate * cores, "cores": cores} for rate in rates)
        return dict(zip(("pillow", "folder", "shards"), found, strict=True))

    files = {"format": "jpeg", "size": 512, "bytes": 1, "images": 1}
    rows = [{**files, "threads": n, "sides": sides(n, 10.0, 30.0 * n, 35.0)} for n in (1, 2)]
    (tmp_path / "loaders").mkdir()
    loaders = {"machine": {**MACHINE, "date": "2026-01-02"}, "recipe": "tiny", "rows": rows}
    (tmp_path / "loaders" / "a.json").write_text(json.dumps(loaders))
    text = " ".join(summary(report, tmp_path).split())
    assert "threads 1, 2: jpeg 3.0 to 6.0 (tiny, images of 512 px; Chip, torch 2.0; abc, 2026-01-02)." in text
    assert "Other work" not in text
    rows[0]["sides"] = sides(0.5, 10.0, 30.0, 35.0)
    (tmp_path / "loaders" / "a.json").write_text(json.dumps(loaders))
    assert "Other work had part of the cores" in summary(report, tmp_path)
    variants = [{"recipe": "tiny", "overrides": [f"model.recompute={policy}"], "purpose": purpose}
                for policy, purpose in (("block", "policy"), ("cheap", "dense"))]  # fmt: skip
    points = [{"variant": variant, "flops_per_image": 2.4e9} for variant in variants]
    fits = [{**variant, "slope": 2.5 * 2**20, "largest_batch": {"80": 7}} for variant in variants]
    (tmp_path / "memory").mkdir()
    profile = {"machine": {"commit": "abc", "date": "2026"}, "batch_sizes": [1, 2], "points": points, "fits": fits}
    (tmp_path / "memory" / "a.json").write_text(json.dumps(profile))
    lines = summary(report, tmp_path).splitlines()
    assert "| the method's | block | 2.5 | 2 | 7 |" in lines
    assert "| none | cheap | 2.5 | 2 | 7 |" in lines


def test_check_names_what_is_out_of_date(report, tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    record(row("reference", 4e-3), row("native", 1e-3)).save(tmp_path / "bench" / "results" / "ops.json")
    readme = tmp_path / "README.md"
    readme.write_text("before\n")
    monkeypatch.setattr("sys.argv", ["report.py"])
    with pytest.raises(SystemExit, match="lacks <!-- measured -->"):
        report.main(tmp_path)
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert report.main(tmp_path) == 0
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith("\nafter\n")
    assert "old" not in readme.read_text()
    monkeypatch.setattr("sys.argv", ["report.py", "--check"])
    assert report.main(tmp_path) == 0
    results = tmp_path / "docs" / "results.md"
    results.write_text(results.read_text().replace("4.00", "9.00"))
    assert report.main(tmp_path) == 1
    assert capsys.readouterr().err.startswith("docs/results.md is not what bench/results gives")
    assert "9.00" in results.read_text(), "a check changes nothing"
