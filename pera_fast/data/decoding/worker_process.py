"""Runs libraries that hostile bytes can crash or hang in a process of their own."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from pera_fast.storage import start

_START_SECONDS = 120.0  # importing DALI from a cold network disk


class DiedError(Exception):
    """The worker is gone; the message says how. stage: what it had last said that it does, or empty."""

    def __init__(self, stage: str, why: str):
        super().__init__(why)
        self.stage = stage


class WorkerProcess:
    """Runs `worker.serve` in a process that is started when needed and started anew when it died.

    One call at a time; `end` may come from any thread.

    Args:
        module: what it runs, as `python -m`; the process gets a socket's number as its argument.
        timeout: seconds between two messages of the worker; after that it is killed.
    """

    def __init__(self, module: str, timeout: float):
        self.timeout, self._module = timeout, module
        self.process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._closed = False

    def call(self, message: Any, staged: Callable[[str], None] = lambda stage: None) -> Any:
        """Send a request and return the worker's answer; `staged` is called with its progress.

        Raises:
            DiedError: it died, or said nothing for too long and was killed.
            MachineError: the machine does not start it.
            RuntimeError: it ended at its start, or was closed.
        """
        connection = self._start()
        stage = ""
        try:
            connection.send(message)
            while True:
                if not connection.poll(self.timeout):
                    self._stop()
                    raise DiedError(stage, f"did not finish within {self.timeout:g} s")
                kind, content = connection.recv()
                if kind == "done":
                    return content
                stage = content
                staged(stage)
        except (EOFError, OSError):
            raise DiedError(stage, self._why()) from None

    def end(self) -> None:
        """Kills the worker; a call that waits for it ends, and none comes after it."""
        self._closed = True
        process = self.process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    def close(self) -> None:
        """Kills the worker and cleans up after it; not while a call is under way."""
        self.end()
        self._stop()

    def _start(self) -> Connection:
        if self._closed:
            raise RuntimeError("the sandbox is closed")
        if self._connection is not None:
            return self._connection
        ours, theirs = start("a process that reads images", socket.socketpair)
        # Run from the root folder, so that no file of the current one stands in for a module.
        search = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        with theirs:
            try:
                self.process = start(
                    "a process that reads images",
                    lambda: subprocess.Popen(
                        [sys.executable, "-m", self._module, str(theirs.fileno())],
                        pass_fds=[theirs.fileno()],
                        stdin=subprocess.DEVNULL,
                        cwd="/",
                        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
                        start_new_session=True,  # Ctrl-C is for the run, which ends its workers itself
                    ),
                )
            except BaseException:
                ours.close()
                raise
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
        """Clean up after the worker, and return the reason of its end."""
        code = self._stop()
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                return f"killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def _stop(self) -> int | None:
        process, connection = self.process, self._connection
        self.process = self._connection = None
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
