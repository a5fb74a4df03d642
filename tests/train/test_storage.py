"""Runs and tools over a storage, or a machine, that fails for a while: nothing of that is held against a file."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from train_support import SMALL, environment

from pera_fast import cli, storage
from pera_fast.data.decoding import probe
from pera_fast.data.files.manifest import Manifest
from pera_fast.data.reading import source
from pera_fast.storage import AloneError, MachineError, Storage, is_passing

pytest.importorskip("nvidia.dali")

IMAGES = 16
KEYS = ["--recipe", "tiny", *SMALL, "data.loader_threads=2", "train.steps=6"]
TOOLS = (
    ("index", "--out", "index.parquet", "--workers", "1"),
    ("pack", "--out", "shards", "--workers", "1"),
    ("dedupe", "--out", "duplicates.csv", "--workers", "1"),
    ("stats", "--json", "stats.json", "--workers", "1"),
    ("tile", "--out", "tiles", "--size", "16", "--workers", "1"),
)
EIO = OSError(5, "Input/output error")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i:02d}.jpg")
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert pretrain(images, out) == 0
    return out


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory):
    """Compiles a C file for LD_PRELOAD."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")

    def build(text: str) -> str:
        folder = tmp_path_factory.mktemp("preload")
        (folder / "faults.c").write_text(text)
        library = str(folder / "faults.so")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, str(folder / "faults.c"), "-ldl"], check=True)
        return library

    return build


@pytest.fixture(scope="module")
def flaky(images: Path, preload) -> dict[str, str]:
    """Environment in which every 70th call on an image begins an outage: of open, then read, then stat."""
    text = (Path(__file__).parent.parent / "data" / "flaky.c").read_text()
    told = {"FLAKY_DIR": str(images), "FLAKY_ERRNO": "5", "FLAKY_EVERY": "70", "FLAKY_SECONDS": "0.03"}
    return environment(LD_PRELOAD=preload(text), **told)


def pretrain(images: Path, out: Path, *more: str) -> int:
    return cli.run(["pretrain", "--data", str(images), "--out", str(out), *KEYS, *more])


def rows(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: row[key] for key in row if key not in ("seconds", "images_per_s", "data_wait", "mem")} for row in lines
    ]


def fails(monkeypatch: pytest.MonkeyPatch, times: int, after: int = 0, before=lambda: None) -> None:
    """Reads of the trainer fail so many times, after some that do not."""
    calls, lock = iter(range(10**9)), threading.Lock()

    def read_file(*arguments):
        with lock:
            call = next(calls)
        if after <= call < after + times:
            before()
            raise OSError(EIO.errno, EIO.strerror)
        return probe.read_file(*arguments)

    monkeypatch.setattr(source, "read_file", read_file)


def test_outages_of_open_read_and_stat_change_nothing(whole, images, flaky, tmp_path, monkeypatch):
    """Neither in a run, nor in what the tools write."""
    tools = [["data", name, str(images), *options] for name, *options in TOOLS]
    run = ["pretrain", "--data", str(images), "--out", "run", *KEYS]
    code = "import json, sys; from pera_fast import cli; sys.exit(sum(map(cli.run, json.loads(sys.argv[1]))))"
    clean, faulty = tmp_path / "clean", tmp_path / "faulty"
    clean.mkdir()
    faulty.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([run, *tools])], cwd=faulty, capture_output=True, text=True,
        env={**flaky, "XDG_CACHE_HOME": str(tmp_path / "cache")}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "read(s) failed (Input/output error) and were repeated" in done.stdout
    assert rows(faulty / "run") == rows(whole)
    assert not (faulty / "run" / "skipped.csv").exists()
    assert Manifest.load(faulty / "run" / "index.parquet").table == Manifest.load(whole / "index.parquet").table
    monkeypatch.chdir(clean)
    assert sum(map(cli.run, tools)) == 0
    written = [path.relative_to(clean) for path in clean.rglob("*") if path.is_file()]
    assert len(written) > IMAGES
    for path in written:
        assert (clean / path).read_bytes() == (faulty / path).read_bytes(), path


def test_a_pause_is_explained_once_and_ends(whole, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(storage, "_SILENT", 0.02)
    fails(monkeypatch, times=8, after=20)
    assert pretrain(images, tmp_path / "run") == 0
    told = capsys.readouterr().err
    pause = f"warning: the storage of {images} does not answer (Input/output error; "
    assert told.count(pause) == 1
    assert "trying again for up to 600 s (data.storage_timeout), nothing is lost meanwhile" in told
    assert f"warning: the storage of {images} answers again after " in told
    assert rows(tmp_path / "run") == rows(whole)


def test_a_storage_that_stays_away_ends_the_run_with_a_checkpoint(whole, images, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        fails(patch, times=10**6, after=23)
        assert pretrain(images, out, "data.storage_timeout=0.2") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    done = len(rows(out))
    assert 0 < done < 6
    assert last.startswith(f"error: the storage of {images} does not answer (Input/output error at {images}/")
    assert last.endswith(
        f": given up after 0 s (data.storage_timeout); stopped after step {done} with a checkpoint; continue with"
        " --resume"
    )
    assert pretrain(images, out, "--resume") == 0
    assert rows(out) == rows(whole)
    assert not (out / "skipped.csv").exists()


def test_a_signal_is_heard_while_the_storage_is_away(whole, images, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        fails(
            patch,
            times=10**6,
            after=23,
            before=lambda: os.kill(os.getpid(), signal.SIGTERM) if (out / "metrics.jsonl").exists() else None,
        )
        patch.setattr("pera_fast.train.signals.SAME_REQUEST_SECONDS", 60.0)
        assert pretrain(images, out) == 143
    assert pretrain(images, out, "--resume") == 0
    assert rows(out) == rows(whole)


def test_a_broken_place_of_the_disk_costs_one_image_each_time_and_is_not_booked(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(storage, "_ALONE", 0.1)
    monkeypatch.setattr(storage, "_SILENT", 0.1)

    def read_file(path, *rest):
        if path.endswith("05.jpg"):
            raise OSError(EIO.errno, EIO.strerror)
        return probe.read_file(path, *rest)

    monkeypatch.setattr(source, "read_file", read_file)
    assert pretrain(images, tmp_path / "run") == 0
    told = capsys.readouterr().err
    reason = "cannot read: Input/output error for 0 s, while other files can be read"
    assert f"warning: {images}/05.jpg: {reason}: another image takes its place this time" in told
    assert not (tmp_path / "run" / "skipped.csv").exists()


def test_a_folder_that_was_unmounted_is_waited_for(images, tmp_path):
    root, away = shutil.copytree(images, tmp_path / "data"), tmp_path / "away"
    calls = []

    def read() -> bytes:
        calls.append(1)
        if len(calls) == 1:
            root.rename(away)
            root.mkdir()  # an empty mount point
        elif len(calls) == 3:
            root.rmdir()
            away.rename(root)
        return (root / "00.jpg").read_bytes()

    assert Storage(root)(read) == (images / "00.jpg").read_bytes()
    with pytest.raises(FileNotFoundError):  # one file alone that is gone is gone
        Storage(root)((root / "nowhere.jpg").read_bytes)


def test_one_that_gives_up_lets_the_others_go(images, monkeypatch):
    def read() -> None:
        raise OSError(EIO.errno, EIO.strerror)

    waiting = Storage(images, timeout=0.0)
    with pytest.raises(MachineError, match=r"given up after 0 s \(data.storage_timeout\)"):
        waiting(read, "a.jpg")
    monkeypatch.setattr(waiting, "_timeout", 600.0)
    with pytest.raises(MachineError):
        waiting(read, "b.jpg")


def test_faults_of_the_storage_are_told_from_those_of_a_file():
    for name in ("EIO", "ESTALE", "ETIMEDOUT", "ENOLINK", "EAGAIN", "EMFILE", "ENOMEM", "ECONNRESET", "ENOTCONN"):
        assert is_passing(OSError(getattr(storage.errno, name), ""))
    for name in ("ENOENT", "EACCES", "EPERM", "EISDIR", "ELOOP", "ENAMETOOLONG"):
        assert not is_passing(OSError(getattr(storage.errno, name), ""))
    assert not is_passing(OSError("changed while it was read"))
    assert not is_passing(AloneError(storage.errno.EIO, ""))


def test_a_process_that_cannot_be_started_is_named(images, preload, tmp_path):
    calls = " ".join(f"int {call}(void) {{ errno = EAGAIN; return -1; }}" for call in ("fork", "vfork"))
    env = environment(LD_PRELOAD=preload(f"#include <errno.h>\n{calls}\n"), XDG_CACHE_HOME=str(tmp_path))
    command = [sys.executable, "-m", "pera_fast", "data", "index", str(images)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "error: cannot start a process that reads images (Resource temporarily unavailable): the limit of processes is"
        " reached (ulimit -u, or the pids limit of the container or the job): raise it, or give fewer workers\n",
    )
    assert storage.cannot_start("it", OSError(storage.errno.ENOMEM, "Cannot allocate memory")) == (
        "cannot start it (Cannot allocate memory): the machine is out of memory; free some, or give fewer workers"
    )


def test_a_thread_that_cannot_be_started_is_named(images, tmp_path, monkeypatch, capsys):
    def start(_thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert cli.run(["data", "index", str(images), "--out", str(tmp_path / "index.parquet")]) == 2
    assert capsys.readouterr().err.startswith("error: cannot start a thread (can't start new thread): the limit of")
