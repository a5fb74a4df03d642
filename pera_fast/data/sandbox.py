"""A worker process that may die: a decoder that is killed by a signal or hangs costs one file, not the run."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection

from pera_fast.data.probe import ProbeResult, ProbeSettings
from pera_fast.data.tar import Member

_START_SECONDS = 120.0  # importing DALI from a cold network disk
_LABELS = {"dali": "DALI", "pillow": "Pillow", "rasterio": "rasterio"}


class _DiedError(Exception):
    """The worker is gone. stage: the decoder at work, or empty."""

    def __init__(self, stage: str, why: str):
        super().__init__(f"{_LABELS.get(stage, 'reading')}: {why}")
        self.stage = stage


class Sandbox:
    """Probes files in a worker process that is started when needed and restarted when it died. Thread-safe.

    Args:
        timeout: seconds for one call; after that the worker is killed and its files are tried one by one.
        module: what the worker runs, as `python -m`; the process gets a socket's number as its argument.
    """

    def __init__(self, timeout: float = 60.0, module: str = "pera_fast.data.worker"):
        self._timeout, self._module = timeout, module
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._lock = threading.Lock()
        self._closed = False

    def probe(
        self, paths: Sequence[str | Member], settings: ProbeSettings, decoders: Sequence[str] | None = None
    ) -> list[ProbeResult]:
        """One result for each absolute path or member (at most probe.MAX_FILES), in order. Never raises for a file.

        Args:
            paths: the files.
            settings: how they will be used.
            decoders: what may be tried; None: settings.decoders.

        Raises:
            RuntimeError: the worker does not start, or the sandbox was closed.
        """
        with self._lock:
            return self._probe(list(paths), settings, tuple(settings.decoders if decoders is None else decoders))

    def _probe(
        self, paths: list[str | Member], settings: ProbeSettings, decoders: tuple[str, ...]
    ) -> list[ProbeResult]:
        try:
            return self._call(paths, settings, decoders)
        except _DiedError as died:
            if len(paths) > 1:  # which of them was it?
                return [result for path in paths for result in self._probe([path], settings, decoders)]
            return [self._probe_rest(paths[0], settings, decoders, died)]

    def _probe_rest(
        self, path: str | Member, settings: ProbeSettings, decoders: tuple[str, ...], died: _DiedError
    ) -> ProbeResult:
        """A decoder died on the file: the ones after it may still know better."""
        told, left = [], list(decoders)
        while True:
            told.append(str(died))
            left = left[left.index(died.stage) + 1 :] if died.stage in left else []
            if not left or not settings.verify:
                size, mtime_ns = _state(path)
                return ProbeResult(str(path), reason="; ".join(told), size=size, mtime_ns=mtime_ns)
            try:
                (result,) = self._call([path], settings, tuple(left))
            except _DiedError as again:
                died = again
                continue
            if not result.ok:
                result.reason = "; ".join([*told, result.reason])
            return result

    def _call(self, paths: list[str | Member], settings: ProbeSettings, decoders: tuple[str, ...]) -> list[ProbeResult]:
        connection = self._start()
        stage = ""
        try:
            connection.send((paths, settings, decoders))
            while True:
                if not connection.poll(self._timeout):
                    self._stop()
                    raise _DiedError(stage, f"did not finish within {self._timeout:g} s")
                kind, content = connection.recv()
                if kind == "done":
                    return content
                stage = content
        except (EOFError, OSError):
            raise _DiedError(stage, self._why()) from None

    def _start(self) -> Connection:
        if self._closed:
            raise RuntimeError("the sandbox is closed")
        if self._connection is not None:
            return self._connection
        ours, theirs = socket.socketpair()
        # Run from the root folder, so that no file of the current one stands in for a module.
        search = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd="/",
                env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for the run, which ends its workers itself
            )
        connection = Connection(ours.detach())
        try:
            ready = connection.poll(_START_SECONDS) and connection.recv() == ("ready",)
        except (EOFError, OSError):
            ready = False
        self._connection = connection
        if not ready:
            why = self._why()
            raise RuntimeError(f"the process that checks images does not start: {why}")
        return connection

    def _why(self) -> str:
        """How the worker ended; cleans up after it."""
        code = self._stop()
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                return f"killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def _stop(self) -> int | None:
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            connection.close()
        if process is None:
            return None
        try:
            return process.wait(timeout=1.0)  # an idle or dead worker goes by itself
        except subprocess.TimeoutExpired:
            process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel: leave it
            process.wait(timeout=5.0)
        return None

    def close(self) -> None:
        """Ends the worker, even while another thread waits for it; that one's call raises RuntimeError."""
        self._closed = True
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        with self._lock:
            self._stop()


def _state(path: str | Member) -> tuple[int, int]:
    try:
        state = os.stat(path.tar if isinstance(path, Member) else path)
    except OSError:
        return -1, 0
    return path.size if isinstance(path, Member) else state.st_size, state.st_mtime_ns
