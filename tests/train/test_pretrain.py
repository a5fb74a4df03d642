"""The whole of `pretrain` on image files: from the command line, in Python, killed, interrupted, resumed, misused."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from train_support import SMALL, environment

from pera_fast import cli
from pera_fast.data.tools.pack import PackSettings, pack
from pera_fast.errors import UserError
from pera_fast.run_result import RunResult
from pera_fast.train import api, loop
from pera_fast.train.checkpoint import checkpoint_path, find_checkpoints, load_checkpoint
from pera_fast.train.early import answer

pytest.importorskip("nvidia.dali")

IMAGES = 14
MEASURED = {"seconds", "images_per_s", "data_wait", "mem"}
KEYS = [*SMALL, "data.loader_threads=1"]


def rows(out: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says of the method, without what it says of the machine."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in lines]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        pixels = rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.{'png' if i % 2 else 'jpg'}")
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """Indexes go to a folder of the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    result = api.pretrain(images, out, "tiny", overrides=[*KEYS, "train.steps=12"])
    assert (result.exit_code, result.steps, result.out) == (0, 12, out)
    assert result.metrics["step"] == 12
    return out


def start(images: Path, out: Path, *more: str, env: dict[str, str] | None = None) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "pera_fast", "pretrain", "--data", str(images), "--out", str(out)]
    return subprocess.Popen(
        [*command, "--recipe", "tiny", *more], env=env or environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for_steps(process: "subprocess.Popen[str]", out: Path, steps: int) -> None:
    """Until so many steps are logged."""
    deadline = time.monotonic() + 120
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_run_folder(whole: Path, images: Path):
    names = {path.name for path in whole.iterdir() if not path.name.startswith(("events", "."))}
    configuration = {"config.yaml", "asked.yaml", "finished.json"}
    assert names == {*configuration, "metrics.jsonl", "train.log", "checkpoints", "exported", "index.parquet"}
    assert [path.name for path in find_checkpoints(whole / "checkpoints")] == [
        "step_00000008.pt", "step_00000010.pt", "step_00000012.pt"
    ]  # fmt: skip
    log = (whole / "train.log").read_text()
    assert "batch 4 in total = 4 per device x 1 device(s)" in log
    assert f"{IMAGES} images, 3 steps per epoch" in log
    assert "warm-ups of 12 steps: learning rate 1 (8%), teacher temperature 2 (17%)" in log
    assert "2 global crops: 3 student, 3 predicted, 10 teacher patches; 2 local crops: 2 student, 5 teacher" in log
    assert "cpu" in log
    assert [row["epoch"] for row in rows(whole)] == [step // 3 for step in range(12)]


def test_exported_teacher_is_the_last_checkpoints(whole: Path):
    teacher = load_file(whole / "exported" / "teacher.safetensors")
    state = load_checkpoint(checkpoint_path(whole / "checkpoints", 12))["model"]
    assert torch.equal(teacher["blocks.0.attn.qkv.weight"], state["teacher.backbone.blocks.0.attn.qkv.weight"])


@pytest.fixture(scope="module")
def killed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a process leaves that is killed after its first checkpoint."""
    out = tmp_path_factory.mktemp("killed") / "run"
    process = start(images, out, *KEYS, "train.steps=12", "train.checkpoint_every=3")
    wait_for_steps(process, out, 5)
    time.sleep(0.02 * (os.getpid() % 5))  # not always at the same point of a step
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert find_checkpoints(out / "checkpoints")
    return out


@pytest.mark.parametrize("lost", [True, False], ids=["before a checkpoint", "after one"])
def test_killed_and_resumed_is_the_run_that_was_not(
    whole: Path, images: Path, killed: Path, tmp_path: Path, lost: bool, capsys: pytest.CaptureFixture[str]
):
    """Killed before a checkpoint: the same folder without those that it has."""
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    if lost:
        for path in (out / "checkpoints").iterdir():
            path.unlink()
        api.pretrain(images, out, None, resume=True)  # the settings are the run's own
    else:
        assert cli.run(["pretrain", "--data", str(images), "--out", str(out), "--recipe", "tiny", "--resume"]) == 0
        assert "resuming from" in capsys.readouterr().out
    assert rows(out) == rows(whole)  # bit for bit: JSON writes floats exactly
    states = [load_checkpoint(checkpoint_path(folder / "checkpoints", 12)) for folder in (out, whole)]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name


def test_signal_saves_and_leaves(whole: Path, images: Path, tmp_path: Path):
    """A process of its own, with SIGUSR1; SIGINT comes below without one, all four in test_signals.py."""
    out = tmp_path / "run"
    process = start(images, out, *KEYS, "train.steps=2000", "train.checkpoint_every=1000")
    wait_for_steps(process, out, 2)
    process.send_signal(signal.SIGUSR1)
    said, complaints = process.communicate(timeout=100)
    assert process.returncode == 138, complaints
    assert "continue with --resume" in said
    assert "Traceback" not in complaints
    (path,) = find_checkpoints(out / "checkpoints")
    assert load_checkpoint(path)["step"] == len(rows(out)) < 2000
    assert (out / "exported" / "teacher.safetensors").exists()


def test_stdout_closed_and_tensorboard_broken(images: Path, tmp_path: Path):
    """Closed as `>&-` does; a leftover folder that TensorBoard takes for TensorFlow is on the path."""
    (tmp_path / "left" / "tensorflow" / "python").mkdir(parents=True)
    env = environment()
    env["PYTHONPATH"] += f"{os.pathsep}{tmp_path / 'left'}"
    program = [sys.executable, "-m", "pera_fast", "pretrain", "--data", str(images), "--out", str(tmp_path / "run")]
    line = f"{shlex.join([*program, '--recipe', 'tiny', *KEYS, 'train.steps=2'])} >&-"
    done = subprocess.run(["sh", "-c", line], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    failed = "warning: tensorboard: failed, training goes on without it: AttributeError: module 'tensorflow'"
    assert failed in done.stderr
    assert "Traceback" not in done.stderr
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]


def test_interrupted_in_python_and_resumed(
    whole: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    before, out = signal.getsignal(signal.SIGINT), tmp_path / "run"
    write = loop.MetricsWriter.write

    def interrupt(self: Any, metrics: dict[str, Any]) -> None:
        write(self, metrics)
        if metrics["step"] == 7:
            os.kill(os.getpid(), signal.SIGINT)

    rng = torch.get_rng_state()
    with monkeypatch.context() as patch:
        patch.setattr(loop.MetricsWriter, "write", interrupt)
        result = api.pretrain(images, out, "tiny", overrides=[*KEYS, "train.steps=12"])
    assert (result.exit_code, result.steps) == (130, 7)
    assert "continue with --resume" in capsys.readouterr().out
    assert load_checkpoint(find_checkpoints(out / "checkpoints")[-1])["step"] == 7
    assert (out / "exported" / "teacher.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is before
    assert torch.equal(torch.get_rng_state(), rng)  # the caller's randomness is the caller's
    result = api.pretrain(images, out, None, resume=True)
    assert (result.exit_code, result.steps) == (0, 12)
    assert rows(out) == rows(whole)


def test_resuming_a_run_that_is_done(whole: Path, images: Path):
    before = rows(whole)
    result = api.pretrain(images, whole, "tiny", resume=True)
    assert (result.exit_code, result.steps, result.metrics) == (0, 12, {})
    assert rows(whole) == before
    assert "all 12 steps are done; with a greater train.steps the run goes on" in (whole / "train.log").read_text()


def test_files_that_came_and_went_do_not_shift_the_others(whole: Path, images: Path, tmp_path: Path):
    """Between stop and resume images are added; the run goes on with those that it knows."""
    data, out = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for path in images.iterdir():
        (data / path.name).hardlink_to(path)
    api.pretrain(data, out, "tiny", overrides=[*KEYS, "train.steps=12", "train.checkpoint_every=5"])
    checkpoint_path(out / "checkpoints", 12).unlink()
    checkpoint_path(out / "checkpoints", 10).unlink()
    (data / "00a.png").hardlink_to(images / "01.png")
    moved = data.rename(tmp_path / "moved")
    api.pretrain(moved, out, "tiny", resume=True)
    assert rows(out) == rows(whole)


def test_shards_are_trained_on_and_resumed_as_the_folder_is(whole: Path, images: Path, tmp_path: Path):
    """Stopped in the middle of an epoch: the same remaining sequence."""
    out = tmp_path / "run"
    pack(images, tmp_path / "shards", PackSettings(size_mib=0.03), progress=False)
    assert len(list((tmp_path / "shards").glob("*.tar"))) > 2
    api.pretrain(tmp_path / "shards", out, "tiny", overrides=[*KEYS, "train.steps=12", "train.checkpoint_every=5"])
    assert rows(out) == rows(whole)
    for step in (10, 12):
        checkpoint_path(out / "checkpoints", step).unlink()
    api.pretrain((tmp_path / "shards").rename(tmp_path / "moved"), out, "tiny", resume=True)
    assert rows(out) == rows(whole)


def test_on_another_number_of_devices_the_epoch_restarts_and_the_log_says_so(images: Path, tmp_path: Path):
    """The checkpoint is made one of two devices with batch 2; one device goes on with it."""
    out, length = (
        tmp_path / "run",
        ["train.steps=null", "train.epochs=3", "optim.warmup_epochs=1", "optim.teacher_temp_warmup_epochs=1"],
    )
    api.pretrain(images, out, "tiny", overrides=[*KEYS, *length, "train.checkpoint_every=5"])
    path = checkpoint_path(out / "checkpoints", 5)  # of 9, 3 an epoch: within epoch 1
    checkpoint_path(out / "checkpoints", 9).unlink()
    state = load_checkpoint(path)
    state["devices"], state["config"] = 2, state["config"].replace("batch_size: 4", "batch_size: 2")
    torch.save(state, path)
    result = api.pretrain(images, out, "tiny", resume=True)
    log = (out / "train.log").read_text()
    assert (
        "1 device(s) instead of 2: a step takes 2 images instead of 4; epoch 1 restarts from its beginning"
        " (train.total_batch_size=4 would go on within it)"
    ) in log
    assert (result.exit_code, result.steps) == (0, 5 + 2 * 7)  # two epochs of 7 steps
    assert [row["epoch"] for row in rows(out)] == [0] * 3 + [1] * 2 + [1] * 7 + [2] * 7
    assert [row["step"] for row in rows(out)] == list(range(1, 20))
    rates = [row["lr"] for row in rows(out)]
    assert rates[-1] == min(rates[5:]), "the schedule ends with the last epoch"
    assert (load_checkpoint(checkpoint_path(out / "checkpoints", 19))["position"]) == 3 * 7


def under_torchrun(images: Path, out: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    """The command line, unchanged, as two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pera_fast"]
    arguments = ["pretrain", "--data", str(images), "--out", str(out), "--recipe", "tiny", *KEYS, *more]
    return subprocess.run([*launch, *arguments], env=environment(), capture_output=True, text=True, timeout=250)


def test_resuming_a_run_that_is_done_is_answered_at_once(whole: Path, images: Path, tmp_path: Path):
    """Without PyTorch; only where there is nothing left to do, and after the settings were checked."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    same = [*KEYS, "train.steps=12"]
    code = (
        "import sys\nfrom pera_fast.cli import run\n"
        "code = run(sys.argv[1:])\nprint('torch' in sys.modules)\nsys.exit(code)"
    )
    line = ["pretrain", "--data", str(images), "--out", str(out), "--resume"]
    for more in ([], ["train.checkpoint_every=5"], ["auto", "--recipe", "tiny", *same]):
        done = subprocess.run(
            [sys.executable, "-c", code, *line, *more], env=environment(), capture_output=True, text=True, check=True
        )
        assert done.stdout == f"{out}: all 12 steps are done; with a greater train.steps the run goes on\nFalse\n"
    assert answer(images, out, None, [], True) == RunResult(0, out, 12)
    assert answer(images, out, None, ["train.steps=13"], True) is None
    assert answer(images, out, None, ["train.total_batch_size=8", "train.batch_size=8"], True) is None
    with pytest.raises(UserError, match=r"cannot be continued with model.depth=3 \(was 2\)"):
        answer(images, out, None, ["model.depth=3"], True)
    with pytest.raises(UserError, match=r"holds a run with other settings: train.steps=13 \(was 12\)"):
        answer(images, out, "tiny", [*same, "train.steps=13"], "auto")
    result = api.pretrain(images, out, None, resume=True, overrides=["train.steps=13"])
    assert (result.exit_code, result.steps) == (0, 13)
    assert answer(images, out, None, [], True) == RunResult(0, out, 13)
    checkpoint_path(out / "checkpoints", 13).unlink()
    assert answer(images, out, None, [], True) is None


def test_under_torchrun(images: Path, tmp_path: Path):
    out = tmp_path / "run"
    done = under_torchrun(images, out, "train.batch_size=2", "train.steps=3")
    assert "Warning" not in done.stderr
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("batch 4 in total = 2 per device x 2 device(s)") == 1
    assert [row["step"] for row in rows(out)] == [1, 2, 3]
    # One process goes on with what two began: the total batch is what counts.
    more = ["train.steps=4", "train.total_batch_size=4"]
    result = api.pretrain(images, out, "tiny", resume=True, overrides=more)
    assert (result.exit_code, result.steps) == (0, 4)
    assert "changed on resuming: train.steps=4 (was 3)" in (out / "train.log").read_text()


def test_under_torchrun_one_process_speaks(images: Path, tmp_path: Path):
    done = under_torchrun(images, tmp_path / "run", "train.total_batch_size=5")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert "train.total_batch_size=5" in said[0]


BAD = {
    "missing data": (lambda t: {"data": t / "none"}, "does not exist"),
    "empty data": (lambda t: {"data": t / "empty"}, "holds no files"),
    "no image": (lambda t: {"data": t / "text"}, "no readable image"),
    "too few images": (
        lambda t: {"overrides": [*KEYS, "train.batch_size=64"]},
        "14 readable image(s) are fewer than the 64",
    ),
    "unwritable out": (lambda t: {"out": Path("/proc/pera")}, "cannot write there"),
    "out is a file": (lambda t: {"out": t / "text" / "a.txt"}, "is a file"),
    "out holds a run": (lambda t: {"out": t / "run"}, "holds a run already"),
    "nothing to resume": (lambda t: {"resume": True}, "no run to resume"),
    "unknown recipe": (lambda t: {"recipe": "vit_x"}, "no such recipe"),
    "unknown key": (lambda t: {"overrides": ["train.stepz=4"]}, "did you mean train.steps"),
    "other recipe": (
        lambda t: {"out": t / "run", "resume": True, "recipe": "vit_s16"},
        "is of recipe tiny, not vit_s16",
    ),
    "other model": (
        lambda t: {"out": t / "run", "resume": True, "overrides": ["model.depth=3"]},
        "cannot be continued with model.depth=3 (was 2)",
    ),
    "other batch": (
        lambda t: {"out": t / "run", "resume": True, "overrides": ["train.batch_size=2"]},
        "give train.total_batch_size=4",
    ),
    "damaged": (lambda t: {"out": t / "damaged", "resume": True, "overrides": []}, "damaged checkpoint"),
    "other images": (
        lambda t: {"out": t / "run", "resume": True, "data": t / "text", "overrides": []},
        "holds none of",
    ),
    "gone images": (
        lambda t: {"out": t / "run", "resume": True, "data": t / "none", "overrides": []},
        "no such folder",
    ),
}


@pytest.fixture(scope="module")
def odd_places(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("places")
    (root / "empty").mkdir()
    (root / "text").mkdir()
    (root / "text" / "a.txt").write_text("no image")
    (root / "text" / "b.jpg").write_text("no image either")
    newest = checkpoint_path(whole / "checkpoints", 12)
    for name, end in (("run", None), ("damaged", -5000)):
        (root / name / "checkpoints").mkdir(parents=True)
        for file in ("config.yaml", "index.parquet"):
            (root / name / file).write_bytes((whole / file).read_bytes())
        (root / name / "checkpoints" / newest.name).write_bytes(newest.read_bytes()[:end])
    return root


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(case: str, odd_places: Path, images: Path, tmp_path: Path):
    change, words = BAD[case]
    arguments = {"data": images, "out": tmp_path / "new", "recipe": "tiny", "resume": False, "overrides": KEYS}
    with pytest.raises(UserError) as error:
        api.pretrain(**{**arguments, **change(odd_places)})
    message = str(error.value)
    assert words in message
    assert "\n" not in message
    assert not (tmp_path / "new").exists()  # what took no step leaves nothing behind


@pytest.mark.parametrize("there", [False, True])
def test_run_that_took_no_step_is_not_in_the_way(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
):
    """It fails in its first step; what was in the folder before stays, and the repeated command runs."""
    out = tmp_path / "runs" / "one"
    if there:
        out.mkdir(parents=True)
        (out / "train.log").write_text("mine\n")

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "launch_step", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            api.pretrain(images, out, "tiny", overrides=[*KEYS, "train.steps=2"])
    assert [path.name for path in out.iterdir()] == ["train.log"] if there else not out.parent.exists()
    assert api.pretrain(images, out, "tiny", overrides=[*KEYS, "train.steps=2"]).steps == 2


def test_killed_before_the_first_step_is_no_run(images: Path, tmp_path: Path):
    """What a process leaves that had no time to clean up: index, empty metrics, log."""
    out = tmp_path / "run"
    out.mkdir()
    for name in ("metrics.jsonl", "index.parquet", "asked.yaml", ".lock", "events.out.tfevents.1.host"):
        (out / name).write_bytes(b"")
    with pytest.raises(UserError, match="no run to resume"):
        api.pretrain(images, out, "tiny", resume=True)
    assert api.pretrain(images, out, "tiny", resume="auto", overrides=[*KEYS, "train.steps=1"]).steps == 1


def test_teacher_of_a_run_that_was_killed_after_its_last_checkpoint(whole: Path, images: Path, tmp_path: Path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    teacher = out / "exported" / "teacher.safetensors"
    teacher.write_bytes(b"")
    os.utime(teacher, ns=(0, 0))  # older than the checkpoint
    api.pretrain(images, out, "tiny", resume=True)
    exported, wanted = load_file(teacher), load_file(whole / "exported" / "teacher.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in wanted.items())


def test_the_command_line_says_it_once(tmp_path: Path):
    process = start(tmp_path / "none", tmp_path / "run", *KEYS)
    said, complaints = process.communicate(timeout=100)
    assert process.returncode == 2
    assert len(complaints.splitlines()) == 1
    assert "does not exist" in complaints
    assert said == ""
