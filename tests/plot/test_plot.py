"""Curves of runs: what is read of metrics.jsonl, how it is thinned, what is drawn, and one line for each fault."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pera_fast import cli
from pera_fast.errors import UserError
from pera_fast.plot import run as plot_run
from pera_fast.plot.curves import Smoother, Thinned
from pera_fast.plot.read import _by_line, read_columns
from pera_fast.plot.run import plot
from pera_fast.plot.runs import read_run


def line(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "epoch": (step - 1) // 10, "loss": 4 / step, "lr": 1e-3, "seconds": 36.0, "mfu": None, **more}


def make_run(folder: Path, rows: list[dict[str, Any]], tail: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """25 steps, of which some were probed and one was not finite; the last line is torn."""
    rows = [line(step, **({"probe_knn": step / 100} if step % 5 == 0 else {})) for step in range(1, 26)]
    rows[6] = {**rows[6], "loss": None, "nonfinite": ["loss"]}
    return make_run(tmp_path / "base", rows, '{"step": 26, "loss": 0.')


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """12 steps of a fine-tuning, with scores in lines of their own, and numbers that are whole."""
    rows = [row for step in range(1, 13) for row in _with_score(step)]
    return make_run(tmp_path / "tuned", rows)


def _with_score(step: int) -> list[dict[str, Any]]:
    row = {key: value for key, value in line(step).items() if key != "seconds"}
    return [{**row, "loss": step}, *([{"step": step, "epoch": 0, "val_f1": 0.5}] if step % 4 == 0 else [])]


# Reading


@pytest.mark.parametrize("chunk", [64, 1000, 1 << 20])
def test_columns_are_those_of_the_lines(base: Path, chunk: int):
    parts = list(read_columns(base / "metrics.jsonl", chunk))
    assert np.concatenate([part["step"] for part in parts]).tolist() == list(range(1, 26))
    loss = np.concatenate([part.get("loss", np.full(len(part["step"]), np.nan)) for part in parts])
    expected = [4 / step for step in range(1, 26)]
    assert np.isnan(loss[6])
    assert np.delete(loss, 6).tolist() == np.delete(expected, 6).tolist()
    assert "mfu" not in parts[0]
    assert "nonfinite" not in parts[-1]


@pytest.mark.parametrize(
    "bad",
    [b'{"step": 2, "loss": 0.', b"[1, 2]", b"\0\0\0", b'"step"', b"", b'{"loss": 1.0}', b'{"step": null}', b"[" * 5000],
)
def test_bad_lines_are_left_out(tmp_path: Path, bad: bytes):
    good = [json.dumps({"step": step, "loss": 0.5 * step}).encode() for step in (1, 3)]
    path = tmp_path / "metrics.jsonl"
    for text in (b"\n".join([good[0], bad, good[1]]), b"\n".join([*good, bad]), b"\n".join([*good, bad]) + b"\n"):
        path.write_bytes(text)
        parts = list(read_columns(path))
        assert [step for part in parts for step in part["step"]] == [1, 3]
        assert [loss for part in parts for loss in part["loss"]] == [0.5, 1.5]


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    rows = ['{"step": 1, "loss": "a", "lr": 1}', '{"step": 2, "loss": 2, "lr": true}', '{"step": 3, "loss": 1e999}']
    path.write_text("\n".join(rows) + "\n")
    (columns,) = read_columns(path)
    assert columns["step"].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(columns["loss"], [np.nan, 2, np.nan if np.isnan(columns["loss"][2]) else np.inf])
    np.testing.assert_array_equal(columns["lr"], [1, np.nan, np.nan])


def test_both_readers_agree(base: Path):
    text = (base / "metrics.jsonl").read_bytes().rpartition(b"\n")[0] + b"\n"
    (fast,) = read_columns(base / "metrics.jsonl")
    slow = _by_line(text)
    for key, values in fast.items():
        np.testing.assert_array_equal(values, slow[key])


# Thinning


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000, 4097])
@pytest.mark.parametrize("piece", [1, 5, 4096])
def test_thinned_curves_keep_means_and_extremes(count: int, piece: int):
    rng = np.random.default_rng(count)
    x, y = np.arange(count, dtype=float), rng.normal(size=count)
    thinned = Thinned(most=8)
    for start in range(0, count, piece):
        thinned.add(x[start : start + piece], y[start : start + piece])
    got, width = thinned.points(), thinned.width
    assert got.shape[1] <= 8
    assert width == 1 or got.shape[1] >= 4
    for place, column in enumerate(got.T):
        part = slice(place * width, (place + 1) * width)
        np.testing.assert_allclose(column, [x[part].mean(), y[part].mean(), y[part].min(), y[part].max()], atol=1e-12)
    assert (got.shape[1] - 1) * width < count <= got.shape[1] * width


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_smoothed_is_the_mean_of_the_last_steps(count: int):
    y = np.random.default_rng(0).normal(size=23)
    smoother = Smoother(count)
    got = np.concatenate([smoother(part) for part in np.split(y, [1, 2, 9, 9, 20])])
    expected = [y[max(0, end - count) : end].mean() for end in range(1, 24)]
    np.testing.assert_allclose(got, expected, atol=1e-12)


# Units of x


def test_steps_epochs_and_hours(base: Path):
    steps, epochs, hours = (read_run(base, "base", unit).curves["lr"].points[0] for unit in ("step", "epoch", "hours"))
    assert steps.tolist() == list(range(1, 26))
    np.testing.assert_allclose(epochs, steps / 10)
    np.testing.assert_allclose(hours, steps / 100)
    assert "epoch" not in read_run(base, "base", "epoch").curves


def test_first_epoch_of_a_run_that_is_done(tmp_path: Path):
    out = make_run(tmp_path / "short", [line(step) for step in range(1, 6)])
    with pytest.raises(UserError, match="ends within its first epoch, whose length is not known; give --x step"):
        read_run(out, "short", "epoch")
    (out / "finished.json").write_text('{"steps_per_epoch": 20}')
    assert read_run(out, "short", "epoch").curves["loss"].points[0, -1] == 0.25


def test_probes_are_points_and_not_smoothed(base: Path, tuned: Path):
    curves = read_run(base, "base", smooth=4).curves
    assert curves["probe_knn"].sparse
    assert curves["probe_knn"].smooth is None
    assert not curves["loss"].sparse
    assert curves["loss"].smooth is not None
    assert curves["loss"].count == 24
    scores = read_run(tuned, "tuned").curves
    assert scores["val_f1"].sparse
    assert scores["val_f1"].points[0].tolist() == [4, 8, 12]
    assert not scores["loss"].sparse


# Pictures


def test_png_of_runs_of_several_kinds(base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "curves.png"
    plotted = plot([base, tuned], out, smooth=3)
    assert plotted.summary == f"{out}: loss, probe_knn, val_f1, lr of 2 runs over step"
    assert plotted.warnings == ()
    with Image.open(out) as picture:
        assert 1200 < picture.width < 1300
        colours = {tuple(pixel) for pixel in np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)}
    assert {(0x2E, 0x6F, 0x95), (0xD1, 0x49, 0x5B)} <= colours  # both runs


def test_page_holds_everything(base: Path, tuned: Path, tmp_path: Path):
    out = tmp_path / "curves.html"
    plotted = plot([base / "metrics.jsonl", tuned], out, keys=["loss,val_f1", "none"])
    assert plotted.warnings == ("--keys none: no run has it; it is left out",)
    page = out.read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "<td>base</td><td>25</td><td>0.16</td><td></td>" in page  # no val_f1
    assert "<td>tuned</td><td>12</td><td>12</td><td>0.5</td>" in page


def test_equal_folders_are_told_apart(tmp_path: Path):
    paths = [make_run(tmp_path / name / "run", [line(1)]) for name in ("a", "b")]
    assert plot_run._names(paths) == ["a/run", "b/run"]


def test_empty_run_beside_another_is_left_out(base: Path, tmp_path: Path):
    empty = make_run(tmp_path / "empty", [])
    plotted = plot([empty, base], tmp_path / "curves.png", keys=["lr"])
    assert plotted.warnings == (f"{empty}/metrics.jsonl: holds no step yet; it is left out",)
    assert "of 1 run over" in plotted.summary


# Faults: text of the command line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "nowhere: no such folder; give run folders (--out of `pera-fast pretrain`)"),
        (["folder"], "folder: holds no metrics.jsonl, so no run; give run folders (--out of `pera-fast pretrain`)"),
        (["empty"], "empty/metrics.jsonl: holds no step yet; there is nothing to draw"),
        (["run", "--keys", "los"], "--keys los: no run has them; known: epoch, loss, lr, seconds; did you mean loss?"),
        (["run", "--x", "hour"], "--x hour: allowed: step | epoch | hours; did you mean hours?"),
        (["run", "--smooth", "0"], "--smooth 0: wants a number of steps, at least 1"),
        (["run", "--out", "a.pdf"], "--out a.pdf: give the name of a .png or .html file in a folder that exists"),
        (["run", "--out", "no/a.png"], "--out no/a.png: give the name of a .png or .html file in a folder that exists"),
        (["run", "--out", "old.png"], "--out old.png: exists already; give another name, or --overwrite to replace it"),
        (["old", "--x", "hours"], "--x hours: old/metrics.jsonl does not tell the seconds of its steps; give --x step"),
    ],
)  # fmt: skip
def test_faults_are_one_line(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", [line(1), line(2)])
    make_run(tmp_path / "empty", [])
    make_run(tmp_path / "old", [{"step": 1, "loss": 1.0}])
    (tmp_path / "folder").mkdir()
    (tmp_path / "old.png").write_bytes(b"old")
    assert cli.run(["plot", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {told}\n"
    assert (tmp_path / "old.png").read_bytes() == b"old"


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", [line(1), line(2)])
    (tmp_path / "curves.png").write_bytes(b"old")
    assert cli.run(["plot", "run", "--keys", "loss,los", "--overwrite"]) == 0
    said = capsys.readouterr()
    assert said.out == "curves.png: loss of 1 run over step\n"
    assert said.err == "warning: --keys los: no run has it; it is left out; did you mean loss?\n"
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 700
