"""Tells faults of the storage or the machine from faults of a file, and waits until the storage answers again.

A file server that is restarted, a disk that is unplugged or a process out of file handles says nothing about the files
that could not be read meanwhile. Everything that reads images goes through `Storage`, which repeats what failed so.
Imports no third-party package, so that workers can load it.
"""

import errno
import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from pera_fast.errors import UserError

_log = logging.getLogger("pera_fast")
T = TypeVar("T")

TIMEOUT = 600.0  # seconds; the default of data.storage_timeout
_SERVER = (
    "EIO", "ESTALE", "ETIMEDOUT", "ETIME", "ENOLINK", "EREMOTEIO", "ECOMM", "EPROTO", "ENOTCONN", "ECONNRESET",
    "ECONNABORTED", "ECONNREFUSED", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET", "EPIPE",
    "ESHUTDOWN", "ENONET", "ENODEV", "EKEYEXPIRED", "ENOKEY", "EKEYREVOKED", "EBUSY", "EAGAIN", "EINTR", "EDEADLK",
)  # fmt: skip
_MACHINE = ("EMFILE", "ENFILE", "ENOMEM", "ENOBUFS")  # its limits are reached, and other work may go
_PASSING = frozenset(getattr(errno, name) for name in _SERVER + _MACHINE if hasattr(errno, name))
_ABSENT = (errno.ENOENT, errno.ENOTDIR)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0  # seconds between two tries
_SILENT = 1.0  # seconds of a fault that nobody need know of
_ALONE = 60.0  # seconds after which other files are asked whether the storage answers
_OTHERS = 64  # that are asked: where a sixteenth of the files is away, all of them answer once in sixty times
_START_PAUSES = (0.1, 0.3, 0.6)  # seconds between tries to start a process
NO_THREAD = "can't start new thread"  # Python's words
_NOTE_SECONDS = 60.0  # between two notes of short faults, which may come by the hundred
_REMEMBERED = 4096  # files that were read, of which some are asked


class MachineError(UserError):
    """The storage or the machine failed for longer than is waited; nothing is wrong with the files."""


class ClosedError(RuntimeError):
    """Nobody waits for the storage any more."""


class AloneError(OSError):
    """One file keeps failing while many others can be read: a broken place of the disk."""


def is_passing(error: OSError) -> bool:
    """Whether an error is of the storage or the machine at this moment, and says nothing about the file."""
    return error.errno in _PASSING and not isinstance(error, AloneError)


class Storage:
    """Reads of a data folder, repeated while the storage is away. Thread-safe; a context manager.

    Args:
        root: the folder, or a file.
        timeout: seconds without an answer after which it gives up.
    """

    def __init__(self, root: str | os.PathLike[str], timeout: float = TIMEOUT):
        self._root, self._timeout = os.fspath(root), timeout
        self._was_there = not self._is_gone()
        self._lock = threading.Lock()
        self._waiting: set[object] = set()  # calls, also one within another
        self._began = 0.0  # of the first fault in a row
        self._said = False
        self.faults = 0  # reads that failed so far
        self._noted = (-_NOTE_SECONDS, 0)  # time of the last note of short faults, and the faults till then
        self._read: deque[tuple[str, int]] = deque(maxlen=_REMEMBERED)
        self._alone: set[tuple[str, int]] = set()
        self._given_up: MachineError | None = None
        self._closed = threading.Event()

    def __enter__(self) -> "Storage":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all waiting; those calls raise ClosedError."""
        self._closed.set()

    @property
    def away(self) -> bool:
        """Whether a read is being repeated."""
        return bool(self._waiting)

    def __call__(self, action: Callable[[], T], file: str = "", offset: int = -1) -> T:
        """The action's result. It is repeated while it raises faults of the storage or the machine.

        Args:
            action: reads, lists or looks; may be called often.
            file: what it looks at, for messages.
            offset: bytes from the file's start, if it reads the file's content; else -1.

        Raises:
            OSError: the action's own, if it is about the file; AloneError where only this file keeps failing.
            MachineError: the storage did not answer in time.
            ClosedError: it was closed meanwhile.
        """
        try:
            result = action()
        except OSError as error:
            if not self._is_fault(error):
                raise
            result = self._repeat(action, error, file, offset)
        if offset >= 0:
            self._read.append((file, offset))
        return result

    def _is_fault(self, error: OSError) -> bool:
        """Whether it is of the storage: also where the whole folder has gone, as when a disk is unmounted."""
        return is_passing(error) or (error.errno in _ABSENT and self._is_gone())

    def _is_gone(self) -> bool:
        if os.path.isfile(self._root):
            return False
        try:
            with os.scandir(self._root) as items:
                return next(items, None) is None
        except OSError:
            return True

    def _repeat(self, action: Callable[[], T], error: OSError, file: str, offset: int) -> T:
        me, since, pause = object(), time.monotonic(), _FIRST_PAUSE
        place, asked = (file, offset), since
        with self._lock:
            if not self._waiting:
                self._began, self._said = since, False
            self._waiting.add(me)
            self.faults += 1
        try:
            while True:
                now = time.monotonic()
                patience = _SILENT if place in self._alone else min(_ALONE, self._timeout / 2)
                if offset >= 0 and now - since >= patience and now - asked >= patience:
                    asked = now
                    if self._others_answer():
                        raise self._found_alone(error, place, now - since)
                late = now - since >= self._timeout or not (self._was_there or is_passing(error))
                if self._given_up is None and late:
                    self._given_up = self._too_long(error, file, now - since)
                if self._given_up is not None:  # the others need not wait as long again
                    raise MachineError(str(self._given_up)) from error
                self._say(error, now)
                left = since + self._timeout - now
                if self._closed.wait(min(pause * random.uniform(0.75, 1.25), max(left, 0.001))):
                    raise ClosedError("the storage is not waited for any more") from error
                pause = min(2 * pause, _LONGEST_PAUSE)
                try:
                    return action()
                except OSError as again:
                    if not self._is_fault(again):
                        raise
                    error = again
        finally:
            self._over(me, error)

    def _say(self, error: OSError, now: float) -> None:
        """Tells the user once, when it takes longer."""
        with self._lock:
            if self._said or now - self._began < _SILENT:
                return
            self._said = True
            reads = len(self._waiting)
        _log.warning(
            "%s (%s; %d read(s) wait): trying again for up to %g s (data.storage_timeout), nothing is lost meanwhile",
            self._what(), _told(error), reads, self._timeout,
        )  # fmt: skip

    def _over(self, me: object, error: OSError) -> None:
        with self._lock:
            self._waiting.remove(me)
            if self._waiting or self._closed.is_set() or self._given_up is not None:
                return
            now = time.monotonic()
            failed = self.faults - self._noted[1]
            silent = not self._said and now - self._noted[0] < _NOTE_SECONDS
            if not silent:
                self._noted = now, self.faults
        if self._said:
            _log.warning("the storage of %s answers again after %.0f s: going on", self._root, now - self._began)
        elif not silent:
            _log.info("%s: %d read(s) failed (%s) and were repeated", self._root, failed, _told(error))

    def _what(self) -> str:
        if self._is_gone():
            return f"the data folder {self._root} is gone"
        return f"the storage of {self._root} does not answer"

    def _too_long(self, error: OSError, file: str, seconds: float) -> MachineError:
        where = f" at {file}" if file else ""
        if not self._was_there:
            return MachineError(f"{self._what()} ({_told(error)}{where})")
        return MachineError(
            f"{self._what()} ({_told(error)}{where}): given up after {seconds:.0f} s (data.storage_timeout)"
        )

    def _found_alone(self, error: OSError, place: tuple[str, int], seconds: float) -> AloneError:
        self._alone.add(place)
        told = f"{error.strerror or error} for {seconds:.0f} s, while other files can be read"
        return AloneError(error.errno, told)

    def _others_answer(self) -> bool:
        """Whether many files that were read before can be read now, past the page cache."""
        places = list(set(self._read))
        if not places:
            return False
        for file, offset in random.sample(places, min(_OTHERS, len(places))):
            try:
                handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                    os.pread(handle, 512, offset)
                finally:
                    os.close(handle)
            except OSError as error:
                if is_passing(error):
                    return False
        return True


def mode(storage: Storage, path: str | os.PathLike[str]) -> int:
    """Mode of a file or folder, as `stat` has it; 0 where there is none. Waits where the storage is away."""
    try:
        return storage(lambda: os.stat(path), os.fspath(path)).st_mode
    except OSError:
        return 0


def start(what: str, action: Callable[[], T]) -> T:
    """Start a process or a thread, tried a few times while the machine has no room for one more.

    Args:
        what: what it is for, such as "the process that checks images".
        action: starts it.

    Raises:
        MachineError: it cannot be started; the message says what to do.
    """
    for pause in (*_START_PAUSES, None):
        try:
            return action()
        except (OSError, RuntimeError) as error:
            if not isinstance(error, OSError) and NO_THREAD not in str(error):
                raise
            if pause is None or not (isinstance(error, RuntimeError) or is_passing(error)):
                raise MachineError(cannot_start(what, error)) from error
        time.sleep(pause)
    raise AssertionError


def cannot_start(what: str, error: Exception) -> str:
    """Message for a process or a thread that the machine did not start."""
    told, number = str(error), getattr(error, "errno", None)
    if isinstance(error, OSError):
        told = error.strerror or told
    if number == errno.EAGAIN or isinstance(error, RuntimeError):
        todo = "the limit of processes is reached (ulimit -u, or the pids limit of the container or the job): raise it"
        return f"cannot start {what} ({told}): {todo}, or give fewer workers"
    if number == errno.ENOMEM:
        return f"cannot start {what} ({told}): the machine is out of memory; free some, or give fewer workers"
    return f"cannot start {what} ({told})"


def _told(error: OSError) -> str:
    """The error, and what to do where it is the process's own limit."""
    told = error.strerror or str(error)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        told += "; raise the limit: ulimit -n"
    return told
