"""The command `python -m tests.data.fuzz`: the same cases every time, going on where it stopped, and findings kept."""

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fuzz import case_worker
from fuzz.case_worker import Cases, case_rng
from fuzz.run import State, report
from fuzz.target import FoundError, Target
from fuzz.targets import TARGETS

from pera_fast.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_it_goes_on_where_it_stopped(tmp_path):
    """One turn, which begins with the case after the earlier call's last."""
    command = [sys.executable, "-m", "tests.data.fuzz", "--minutes", "0", "--only", "labels", "--state", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    State(0, 60.0, {"labels": 5}, {"labels": {"read": 5}}).save(tmp_path / "seed-0.json")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    state = json.loads((tmp_path / "seed-0.json").read_text())
    assert state["next"] == {"labels": 6}
    assert sum(state["outcomes"]["labels"].values()) == 6
    assert "labels (CSV files of labelled images): 6 cases" in done.stdout


def test_a_case_is_the_same_every_time():
    assert case_rng(3, "labels", 7).bytes(8) == case_rng(3, "labels", 7).bytes(8)
    others = [case_rng(4, "labels", 7), case_rng(3, "tars", 7), case_rng(3, "labels", 8)]
    assert case_rng(3, "labels", 7).bytes(8) not in [rng.bytes(8) for rng in others]


class Planted(Target):
    """Faults of every kind, by the case's first draw."""

    name, covers = "planted", "nothing"
    fault = "none"

    def run(self, rng):
        (self.case / "input").write_bytes(rng.bytes(4))
        if self.fault == "traceback":
            raise KeyError("x")
        if self.fault == "memory":
            pages = mmap.mmap(-1, 2**29 + 2**26)  # memory of its own: what malloc gives may be resident already
            np.frombuffer(pages, np.uint8)[:: mmap.PAGESIZE] = 1
        if self.fault == "wrong":
            raise FoundError("other contents than were written")
        return "read"


@pytest.mark.parametrize(
    ("fault", "told"),
    [("none", ""), ("traceback", "KeyError: 'x'"), ("memory", "took "), ("wrong", "FoundError: other contents")],
)
def test_faults_are_found(tmp_path, monkeypatch, fault, told):
    monkeypatch.setitem(case_worker.TARGETS, "planted", Planted)
    monkeypatch.setattr(Planted, "fault", fault)
    cases = Cases()
    cases._limited = True  # the limit would stay with this process
    outcome, found = cases(str(tmp_path), "planted", 0, 1, print)
    assert found.startswith(told)
    assert (outcome == "FOUND") is bool(told)
    assert (tmp_path / "planted" / "case" / "input").is_file()


def test_a_refusal_of_several_lines_is_found():
    from fuzz.target import judged

    def refuse(text):
        def action():
            raise UserError(text)

        return judged(action)

    assert refuse("one line") == "refused"
    for text in ("two\nlines", "", "x" * 3000):
        with pytest.raises(FoundError):
            refuse(text)


def test_the_report_says_what_every_target_covers():
    text = report(State(0, 60.0, {"tars": 5}, {"tars": {"damaged": 4, "FOUND": 1}}, {"KeyError [x]": ["tars:3"]}))
    assert "5 cases in 1.0 minutes, 1 found" in text
    assert "5 cases: 1 FOUND, 4 damaged" in text
    assert "found 1 times, tars:3: KeyError [x]" in text
    page = (ROOT / "CONTRIBUTING.md").read_text()
    for name, target in TARGETS.items():
        assert f"{name} ({target.covers})" in text
        assert f"`{name}`" in page
