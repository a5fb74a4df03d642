"""Atomic file writes, and locks between processes. Imports no third-party package, so that workers can load it."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def partial_path(path: Path) -> Path:
    """The hidden file beside ``path`` that holds its contents until they are complete."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def whole_file(path: Path, sync: bool = False) -> Iterator[Path]:
    """Replace a file in one step: a reader, or a process after a crash, sees the old file or the whole new one.

    Args:
        path: the file; its folder exists.
        sync: wait until the disk has the contents and the new name, so that a power cut loses neither.

    Yields:
        Path to write the contents to. It is removed if the block raises.

    Raises:
        OSError: the contents cannot be synced or moved; the old file stays.
    """
    partial = partial_path(path)
    try:
        yield partial
        if sync:
            _sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if sync:
        _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises OSError if it cannot be read, ValueError if it holds anything else."""
    try:
        told = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("too many brackets within brackets") from None
    if not isinstance(told, dict):
        raise ValueError(f"holds {type(told).__name__}, not an object")
    return told


def lock(file: IO[Any], wait: bool = False) -> OSError | None:
    """Lock an open file against other processes, until it is closed.

    Args:
        file: any open file.
        wait: wait for the process that holds the lock.

    Returns:
        None, or the error of a file system that has no locks: then nothing is locked.

    Raises:
        BlockingIOError: another process holds the lock, and ``wait`` is False.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        return error
    return None
