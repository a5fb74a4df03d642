"""The one command for a GPU: every part is reported, whatever becomes of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pera_bench import gpu, quick
from pera_bench.gpu import Part
from pera_bench.selection import chosen_implementations, load, select
from pera_bench.suites import SUITES

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    write = "from pathlib import Path; Path(r'{out}/found.json').write_text('{\"rows\": [1]}')"
    monkeypatch.delenv("SOMETHING_UNSET", raising=False)
    made = [
        Part("fails", python("raise SystemExit('no luck')"), 20),
        Part("hangs", python(f"import time; {write}; time.sleep(100)"), 1),
        Part("has_no_need", python(write), 20, needs="SOMETHING_UNSET"),
        Part("garbage", python("from pathlib import Path; Path(r'{out}/a.json').write_text('{')"), 20),
        Part("works", python(write), 20),
    ]
    monkeypatch.setattr(gpu, "parts", lambda *_: made)
    (tmp_path / "fails").mkdir()
    (tmp_path / "fails" / "old.json").write_text("{}")
    assert gpu.main([str(tmp_path), "--device", "cpu"]) == 1
    found = {part["name"]: part for part in json.loads((tmp_path / "results.json").read_text())["parts"]}
    assert {name: part["status"] for name, part in found.items()} == {
        "fails": "failed", "hangs": "too long", "has_no_need": "left out", "garbage": "ok", "works": "ok",
    }  # fmt: skip
    assert "no luck" in found["fails"]["reason"]
    assert found["fails"]["results"] == {}, "what an earlier run left is not this one's"
    assert found["has_no_need"]["reason"] == "SOMETHING_UNSET is not set"
    assert "a.json" in found["garbage"]["reason"]
    assert found["hangs"]["results"] == {"found": {"rows": [1]}}, "what it had written before is kept"
    assert found["hangs"]["seconds"] < 20
    assert "works: ok" in capsys.readouterr().out


def test_parts_without_time_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "parts", lambda *_: [Part("late", python("pass"), 20)])
    assert gpu.main([str(tmp_path), "--device", "cpu", "--minutes", "0"]) == 0
    (part,) = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert (part["status"], part["reason"]) == ("left out", "no time left of 0 minutes")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_every_part_says_that_it_needs_one(tmp_path):
    script, env = ROOT / "bench" / "gpu" / "run_all.sh", {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([script, tmp_path], env=env, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert len(found) == 16
    assert all(part["status"] == "left out" and part["reason"].startswith("needs a GPU") for part in found)
    assert all(f"{part['name']}: left out" in done.stdout for part in found)


def test_benches_of_the_parts_exist():
    made = gpu.parts("cuda", "vit_b16", [16, 32])
    benches = [part.command for part in made if "bench" in part.command]
    assert len(benches) == 4
    for command in benches:
        named = command[command.index("bench") + 1 : command.index("--images")]
        assert select(",".join(named))
        if "--only" in command:
            wanted = command[command.index("--only") + 1]
            suites = [load(suite) for suite, _ in select(",".join(named))]
            cpu = torch.device("cpu")
            kept = [chosen_implementations(suite.IMPLEMENTATIONS, cpu, wanted) for suite in suites]
            assert set().union(*kept) == set(wanted.split(","))
            assert all(kept)


def test_every_op_is_in_the_run():
    assert {*gpu.OPS, "step", "data"} == set(SUITES) - {"crop_resize", "transposed"}  # which are for CPUs
    assert {name.partition("/")[2] for name in gpu.STEPS} == set(load("step").CASES)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(gpu, "OPTIONAL", {"torch": "a", "no_such_package": "b", "no_such_package.inner": "c"})
    assert gpu.lacking() == {"no_such_package": "b", "no_such_package.inner": "c"}


def test_the_quick_run_measures_a_step_and_prints_one_table(tmp_path, capsys):
    quick = ["--quick", "--device", "cpu", "--recipe", "tiny", "--parts", "step-16,published-16"]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PERA_OFFICIAL", raising=False)
        patch.setenv("PYTHONPATH", os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "bench")))
        assert gpu.main([str(tmp_path), *quick]) == 0
    step, published = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert published["reason"] == "PERA_OFFICIAL is not set"
    (found,) = step["results"].values()
    assert found["ms_min"] <= found["ms"] <= found["ms_max"]
    assert found["images_per_s"] == pytest.approx(16_000 / found["ms"])
    assert {"device", "torch", "commit", "date"} <= found.keys()
    lines = (tmp_path / "table.txt").read_text().splitlines()
    assert lines[0].split()[:4] == ["part", "status", "s", "ms"]
    assert lines[1].startswith("step-16")
    assert f"{found['ms']:.1f}" in lines[1]
    assert lines[1] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("made", "minutes"), [(gpu.quick_parts, 4), (lambda *where: gpu.parts(*where, [16, 32, 64, 128]), 8)]
)
def test_the_parts_fit_their_time(made, minutes):
    """All of them, if each takes as long as it may."""
    found = made("cuda", "vit_b16")
    assert found[0].name == "tests", "correctness first"
    assert sum(part.limit for part in found) <= 60 * minutes
    steps = {f"{side}-{batch}" for side in ("step", "published") for batch in (16, 64, 256)}
    wanted = steps | {"trace-64", "loader"} | ({"pretrain", "step-64-fp8", "ops", "memory"} if minutes == 8 else set())
    assert {part.name for part in found} >= wanted
    assert len({part.name for part in found}) == len(found), "a part's name is its folder"


def test_every_gpu_test_of_the_parts_exists():
    """pytest collects nothing at all where one of its arguments is not there."""
    for path in gpu.TESTS:
        files = [ROOT / path] if path.endswith(".py") else sorted((ROOT / path).rglob("test_*.py"))
        assert any("mark.gpu" in file.read_text(encoding="utf-8") for file in files), path


def test_a_run_from_files_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quick, "SCENES", 8)
    small = [
        "--batch",
        "4",
        "--recipe",
        "tiny",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--rounds",
        "1",
        "--steps",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["quick", "pretrain", *small, "--json", str(tmp_path / "p.json")])
    quick.main()
    found = json.loads((tmp_path / "p.json").read_text())
    assert (found["part"], found["batch"], found["settings"]) == ("pretrain", 4, [])
    assert found["images_per_s"] > 0
    assert 0 <= found["data_wait"] <= 1
    assert 0 <= found["host_waited_ms"] <= found["host_ms"]
    assert "decoders" not in found  # a CPU has one
