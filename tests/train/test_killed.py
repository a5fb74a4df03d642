"""Killed at random moments and restarted by the same line with `--resume auto`: the same run to the bit.

`PERA_TEST_KILLS=20 PERA_TEST_SEED=3 python -m pytest tests/train/test_killed.py` kills it twenty times.
"""

import json
import os
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

from pera_fast.train.checkpoint import checkpoint_path, find_checkpoints, load_checkpoint

pytest.importorskip("nvidia.dali")

KILLS = int(os.environ.get("PERA_TEST_KILLS", "3"))
SEED = int(os.environ.get("PERA_TEST_SEED", "0"))
STEPS = 16 + 4 * KILLS
MEASURED = {"seconds", "images_per_s", "data_wait", "mem"}


def rows(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in lines]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(14):
        pixels = rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i:02d}.{'png' if i % 2 else 'jpg'}")
    return tmp_path / "images"


def test_killed_again_and_again_is_the_run_that_was_not(images: Path, tmp_path: Path):
    settings = [*SMALL, "data.loader_threads=1", f"train.steps={STEPS}", "train.checkpoint_every=3"]
    driver = [sys.executable, str(Path(__file__).with_name("killed_driver.py")), str(images)]
    done = subprocess.run(
        [*driver, str(tmp_path), str(KILLS), str(SEED), *settings],
        env=environment(XDG_CACHE_HOME=str(tmp_path / "cache")), capture_output=True, text=True,
        timeout=100 + 30 * KILLS,
    )  # fmt: skip
    log = (tmp_path / "killed.log").read_text() if (tmp_path / "killed.log").exists() else ""
    assert done.returncode == 0, done.stderr + log
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["status"] == 0, f"{told}\n{log}"
    assert "Traceback" not in log, log
    ended = [kill["status"] for kill in told["kills"]]
    print(*told["kills"], sep="\n")
    assert all(status <= 0 for status in ended)  # none was refused
    assert 3 * sum(status < 0 for status in ended) >= 2 * KILLS  # a late one may find it done

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert rows(killed) == rows(whole)  # bit for bit: JSON writes floats exactly
    assert len(rows(killed)) == STEPS
    states = [load_checkpoint(checkpoint_path(out / "checkpoints", STEPS)) for out in (killed, whole)]
    for part in ("model", "optimizer"):
        assert_equal(states[0][part], states[1][part])
    assert_equal(*(load_file(out / "exported" / "teacher.safetensors") for out in (killed, whole)))
    assert [path.name for path in (killed / "checkpoints").iterdir() if path.name.startswith(".")] == []
    assert len(find_checkpoints(killed / "checkpoints")) == 3


@pytest.mark.skipif(KILLS < 20, reason="takes a minute: by hand, with PERA_TEST_KILLS=20")
def test_torchrun_restarts_what_was_killed(images: Path, tmp_path: Path):
    """`torchrun --max-restarts=2`: each of the two workers is killed once, and the run goes on by itself."""
    assert torchrun(images, tmp_path / "whole", kills=()) == 0
    assert torchrun(images, tmp_path / "killed", kills=("1", "0")) == 0
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def torchrun(images: Path, out: Path, kills: tuple[str, ...]) -> int:
    """Train with two processes, of which those of these local ranks are killed, one after the other."""
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=2",
        "-m",
        "pera_fast",
    ]
    line = ["pretrain", "--data", str(images), "--out", str(out), "--recipe", "tiny", "--resume", "auto"]
    settings = [*SMALL, "data.loader_threads=1", "train.batch_size=2", "train.steps=40", "train.checkpoint_every=3"]
    with open(out.with_suffix(".log"), "w") as log:
        command = [sys.executable, *launch, *line, *settings]
        process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
        for number, local_rank in enumerate(kills, start=1):
            while process.poll() is None and lines_of(out) < 10 * number:
                time.sleep(0.05)
            os.kill(worker(process.pid, local_rank), signal.SIGKILL)
            while process.poll() is None and lines_of(out) >= 10 * number:  # cut when the run goes on
                time.sleep(0.05)
        return process.wait(timeout=200)


def lines_of(out: Path) -> int:
    return (out / "metrics.jsonl").read_text().count("\n") if (out / "metrics.jsonl").exists() else 0


def worker(parent: int, local_rank: str) -> int:
    """Process number of torchrun's worker."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"LOCAL_RANK={local_rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"torchrun has no worker {local_rank}")


def assert_equal(a: Any, b: Any) -> None:
    """Equal to the bit, tensors in dictionaries and lists included."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b
