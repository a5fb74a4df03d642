"""Checkpoints: whole or not at all, pruned, checked, and read without executing code."""

import errno
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from train_support import environment, flip_middle, state

from pera_fast.errors import UserError
from pera_fast.train import checkpoint
from pera_fast.train.checkpoint import (
    FORMAT,
    NotWrittenError,
    checkpoint_path,
    find_checkpoints,
    load_checkpoint,
    load_newest,
    save_checkpoint,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_and_name(tmp_path: Path):
    path = save_checkpoint(tmp_path / "checkpoints", state(60), keep=3)
    assert path == tmp_path / "checkpoints" / "step_00000060.pt"
    got = load_checkpoint(path)
    assert got.keys() == checkpoint.FIELDS.keys()
    assert torch.equal(got["model"]["weight"], torch.arange(5000.0) + 60)


def test_pruned_to_the_newest(tmp_path: Path):
    (tmp_path / ".step_00000001.pt.partial").write_bytes(b"left by a process that was killed while it wrote")
    (tmp_path / "step_mine.pt").write_bytes(b"not ours")
    for step in (1, 2, 9, 10, 123456789):
        save_checkpoint(tmp_path, state(step), keep=2)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step_00000010.pt", "step_123456789.pt"]
    assert names(tmp_path) == ["step_00000010.pt", "step_123456789.pt", "step_mine.pt"]


def test_no_space_keeps_the_last_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    save_checkpoint(tmp_path, state(1), keep=1)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NotWrittenError) as error:
        save_checkpoint(tmp_path, state(2), keep=1)
    assert names(tmp_path) == ["step_00000001.pt"]
    assert "No space left on device" in str(error.value)
    assert "step_00000001.pt" in str(error.value)  # says what is still good
    assert caplog.text == ""  # once
    found = load_newest(tmp_path)
    assert found is not None
    assert found[1]["step"] == 1


def test_older_checkpoints_make_room_for_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    """A disk that holds two checkpoints, one of them while the other is written."""
    write = checkpoint._write

    def limited(path: Path, contents: dict) -> None:
        if len(find_checkpoints(tmp_path)) > 1:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, contents)

    monkeypatch.setattr(checkpoint, "_write", limited)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, state(step), keep=3)
    assert names(tmp_path) == ["step_00000002.pt", "step_00000003.pt"]
    assert "No space left on device: removing all checkpoints but the newest to make room" in caplog.text


def test_limit_hit_inside_of_torch_save(tmp_path: Path):
    """The kernel refuses to let the file grow: what a full disk does, in the middle of torch's own writing."""
    code = textwrap.dedent("""
        import resource, signal, sys
        from pathlib import Path
        from train_support import state
        from pera_fast.train.checkpoint import NotWrittenError, save_checkpoint
        folder = Path(sys.argv[1])
        assert save_checkpoint(folder, state(1), keep=3)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            save_checkpoint(folder, state(2), keep=3)
        except NotWrittenError as error:
            sys.exit(str(error))
    """)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 1, done.stderr
    assert names(tmp_path) == ["step_00000001.pt"]
    assert "File too large" in done.stderr
    assert load_checkpoint(checkpoint_path(tmp_path, 1))["step"] == 1


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-700]),
    "one bit": flip_middle,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no checkpoint\n"),
    "tail of zeros": lambda path: path.write_bytes(path.read_bytes()[:9000] + bytes(12000)),
    "other content": lambda path: torch.save({"step": 2}, path),
    "a field missing": lambda path: torch.save({k: v for k, v in state(2).items() if k != "optimizer"}, path),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_newest_is_named_with_the_older_good_one(tmp_path: Path, damage):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, state(step), keep=3)
    damage(checkpoint_path(tmp_path, 3))
    flip_middle(checkpoint_path(tmp_path, 2))
    with pytest.raises(UserError) as error:
        load_newest(tmp_path)
    message = str(error.value)
    assert str(checkpoint_path(tmp_path, 3)) in message
    assert "step_00000001.pt" in message  # 2 is damaged as well
    assert "\n" not in message


def test_damaged_only_one(tmp_path: Path):
    save_checkpoint(tmp_path, state(1), keep=3)
    flip_middle(checkpoint_path(tmp_path, 1))
    with pytest.raises(UserError, match="no older one is good"):
        load_newest(tmp_path)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (os.environ["PERA_TEST_BOMB"],))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PERA_TEST_BOMB", str(tmp_path / "ran"))
    torch.save(state(1, scaler={"bomb": Bomb()}), checkpoint_path(tmp_path, 1))
    with pytest.raises(UserError, match="damaged"):
        load_newest(tmp_path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "ran").exists()  # it would have gone off


def test_newer_format(tmp_path: Path):
    torch.save(state(1, format=FORMAT + 1), checkpoint_path(tmp_path, 1))
    with pytest.raises(UserError, match="newer pera-fast"):
        load_newest(tmp_path)


def test_no_folder(tmp_path: Path):
    assert load_newest(tmp_path / "none") is None
