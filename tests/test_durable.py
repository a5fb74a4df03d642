"""Files that are replaced in one step, and locks between processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pera_fast.durable import lock, partial_path, whole_file


@pytest.mark.parametrize("sync", [False, True])
def test_a_file_is_replaced_at_the_end(tmp_path: Path, sync: bool) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")
    with whole_file(path, sync) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["state.json"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")

    def interrupted() -> None:
        with whole_file(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert not partial_path(path).exists()


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "never"):
        pass


def test_one_process_holds_a_lock(tmp_path: Path) -> None:
    program = "import sys; from pera_fast.durable import lock\nlock(open(sys.argv[1], 'a'))"
    command = [sys.executable, "-c", program, str(tmp_path / "lock")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with (tmp_path / "lock").open("a") as file:
        assert lock(file) is None
        other = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert "BlockingIOError" in other.stderr
    subprocess.run(command, env=environment, check=True)


def test_a_file_system_without_locks_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file, how) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with (tmp_path / "lock").open("a") as file:
        error = lock(file)
    assert error is not None
    assert error.errno == 38
