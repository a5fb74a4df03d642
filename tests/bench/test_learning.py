"""The comparison of what is learned: a run of ours in small, its record, and the page that is made of one."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import learning
import report_learning
from pera_bench import learning_side

SMALL = {
    "model.embed_dim": 32,
    "model.depth": 2,
    "model.num_heads": 2,
    "model.head_hidden": 32,
    "model.bottleneck": 16,
    "model.prototypes": 32,
    "views.global_size": 32,
    "views.local_size": 16,
    "views.num_local": 1,
    "train.batch_size": 4,
}
PROBES = [f"{probe}_{pooling}" for probe in ("knn", "linear") for pooling in ("cls", "mean")]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that differ in colour, in folders of train and test."""
    root, rng = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for name, level in (("dark", 40), ("bright", 200)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.normal(level, 20, (40, 40, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def in_this_process(command: list[str], **_):
    """`subprocess.run` without a process."""
    if command[0] == "git":
        return subprocess.CompletedProcess(command, 0, stdout="")
    learning_side.main(command[3:])
    return subprocess.CompletedProcess(command, 0)


def test_ours_is_trained_and_probed_and_not_trained_again(scenes: Path, tmp_path: Path, monkeypatch) -> None:
    arguments = ["--data", str(scenes), "--out", str(tmp_path / "W"), "--json", str(tmp_path / "r.json")]
    arguments += ["--sides", "ours", "--seeds", "1", "--epochs", "2"]
    arguments += [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    monkeypatch.setattr(learning.subprocess, "run", in_this_process)
    monkeypatch.setattr(learning, "POINTS", 2)
    learning.main(arguments)
    record = json.loads((tmp_path / "r.json").read_text())
    ours, random = record["runs"]
    assert [point["images"] for point in ours["points"]] == [16, 32]
    assert ours["points"][0]["processor_s"] <= ours["points"][1]["processor_s"]
    assert set(PROBES) <= set(ours["points"][-1])
    assert all(0 <= random["points"][0][probe] <= 1 for probe in PROBES)
    assert random["points"][0]["knn_mean"] == 1  # colours alone tell these classes apart
    assert record["clock"] == "processor"
    assert ours["losses"]["loss"] > 0

    monkeypatch.setattr(learning_side, "main", lambda _: pytest.fail("trained a second time"))
    learning.main(arguments)
    again = json.loads((tmp_path / "r.json").read_text())
    assert again["runs"] == record["runs"]


def test_a_run_without_a_step_is_named(tmp_path: Path) -> None:
    watch = learning_side.Watch(tmp_path / "run")
    watch.start()
    with pytest.raises(learning_side.UserError, match="taken no step"):
        watch.close()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sides", "ours,theirs"], "no such side; known: published, ours"),
        (["--sides", "published"], "wants a checkout"),
        (["--sides", "ours,longer"], "wants published and ours"),
    ],
)
def test_wrong_arguments_are_named(more: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        learning.parse(["--data", "d", "--out", "o", *more])
    assert message in capsys.readouterr().err


def test_longer_has_as_many_minutes_as_the_published_code(scenes: Path, tmp_path: Path) -> None:
    for side, seconds in (("published", 90.0), ("ours", 60.0)):
        run = tmp_path / "runs" / f"{side}-0"
        run.mkdir(parents=True)
        (run / "times.json").write_text(json.dumps([{"step": 20, "processor_s": seconds, "wall_s": 1.0}]))
    args = learning.parse(["--data", str(scenes), "--out", str(tmp_path), "--sides", "ours", "--seeds", "1"])
    args.epochs = 5
    cfg = learning.load_config("tiny", ["train.batch_size=4"])
    what = learning.Comparison(args, learning.read_samples("scene", scenes), cfg)
    assert what.steps("ours") == 20
    assert what.steps("longer") == 30


def test_minutes_are_made_steps_by_a_trial(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "trials" / "ours"
    run.mkdir(parents=True)
    times = [{"step": step, "processor_s": step / 4 + 1, "wall_s": 1.0} for step in learning.TRIAL]
    (run / "times.json").write_text(json.dumps(times))
    args = learning.parse(["--data", str(scenes), "--out", str(tmp_path), "--sides", "ours", "--minutes", "2"])
    what = learning.Comparison(args, learning.read_samples("scene", scenes), learning.load_config("tiny"))
    assert what.steps("ours") == 2 * 60 * 4


def point(images: int, seconds: float, level: float) -> dict:
    probes = dict.fromkeys(PROBES, level)
    return {"step": images // 16, "images": images, "processor_s": seconds, "wall_s": 9 * seconds, **probes}


def record() -> dict:
    losses = dict.fromkeys(report_learning.LOSSES, 1.5)
    runs = [{"side": "random", "seed": seed, "points": [point(0, 0.0, 0.3)]} for seed in (0, 1, 2)]
    for side, seconds, level in (("published", 120.0, 0.5), ("ours", 60.0, 0.52)):
        for seed in (0, 1, 2):
            points = [point(800, seconds / 2, level - 0.1), point(1600, seconds, level + seed / 100)]
            runs.append({"side": side, "seed": seed, "commit": "abc", "points": points, "losses": losses})
    machine = {"device": "a CPU", "threads": 1, "torch": "2.13", "date": "2026-11-27 05:00 UTC"}
    return {
        **{"machine": machine, "published": "2103eb3572", "recipe": "tiny", "settings": [], "batch": 16},
        **{"epochs": 5, "minutes": None, "clock": "processor", "images": {"train": 320, "test": 80}},
        **{"classes": 21, "data": "some", "runs": runs},
    }


def test_page_has_medians_spreads_and_differences(tmp_path: Path) -> None:
    assert "Not recorded yet" in "\n".join(report_learning.learning_page(tmp_path))
    (tmp_path / "a.json").write_text(json.dumps(record()))
    lines = report_learning.learning_page(tmp_path)
    cells = " | ".join(["53.0 (52.0 to 54.0)"] * 4)
    assert f"| ours | 1600 | 1.00 (1.00 to 1.00) | {cells} |" in lines
    cut = " | ".join(["40.0 (40.0 to 40.0)"] * 4)
    assert f"| published code, by the time that ours ends | 800 | 1.00 (1.00 to 1.00) | {cut} |" in lines
    assert "| random weights | 0 |  | " + " | ".join(["30.0 (30.0 to 30.0)"] * 4) + " |" in lines
    text = " ".join(lines)
    assert "kNN, cls +2.0 (2.0)" in text
    assert "published code at 2103eb3; abc, 2026-11-27" in text
    short = " ".join(report_learning.learning_summary(tmp_path))
    assert "kNN, cls 53.0 % against 51.0 %" in short
    assert "50 % of its processor time" in short
    assert "None of these differences is larger" in short
    apart = record()
    for run in apart["runs"][6:]:
        run["points"][-1]["knn_mean"] = 0.9
    (tmp_path / "a.json").write_text(json.dumps(apart))
    assert "Beyond the spread over seeds: kNN, mean." in " ".join(report_learning.learning_summary(tmp_path))


def test_curves_are_drawn_from_the_first_checkpoint_to_the_last() -> None:
    import runpy

    draw = runpy.run_path(str(learning.ROOT / "docs" / "images" / "learning.py"))["draw"]
    _, _, left, right = draw(record()).axes
    assert [line.get_label() for line in left.get_lines()] == ["published code", "ours"]
    assert left.get_lines()[1].get_xdata().tolist() == [0, 0.8, 1.6]
    assert right.get_lines()[1].get_xdata().tolist() == [0, 0.5, 1]
    assert right.get_lines()[1].get_ydata() == pytest.approx([30, 42, 53])
