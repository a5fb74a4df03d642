"""Workers that outlive their sandbox: to import DALI anew takes longer than what most tests do with a worker.

That a sandbox ends its own worker is tested in tests/data/decoding/test_sandbox.py, which takes none of these.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pera_fast.data.decoding import sandbox
from pera_fast.data.decoding.worker_process import WorkerProcess

KEPT = "pera_fast.data.decoding.worker"
MOST = 3  # that wait for the next sandbox
_idle: list[WorkerProcess] = []


class KeptWorker(WorkerProcess):
    """Takes over an idle process where there is one, and leaves its own behind if that is idle when it is closed."""

    _busy = False

    def call(self, message: Any, staged: Callable[[str], None] = lambda stage: None) -> Any:
        self._busy = True  # stays so if the call fails: such a process is not handed on
        result = super().call(message, staged)
        self._busy = False
        return result

    def end(self) -> None:
        self._closed = True
        if self._busy:
            super().end()

    def close(self) -> None:
        self.end()
        if self._busy or self.process is None or self._module != KEPT or len(_idle) == MOST:
            super().end()
            self._stop()
            return
        left = WorkerProcess(KEPT, self.timeout)
        left.process, left._connection = self.process, self._connection
        self.process = self._connection = None
        _idle.append(left)

    def _start(self) -> Any:
        if not self._closed and self._connection is None and self._module == KEPT and _idle:
            left = _idle.pop()
            if left.process is not None and left.process.poll() is None:
                self.process, self._connection = left.process, left._connection
        return super()._start()


@pytest.fixture(scope="session", autouse=True)
def kept_workers() -> Iterator[None]:
    """Sandboxes hand on their workers until the end of the session. Import it where images are indexed or loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "WorkerProcess", KeptWorker)
        yield
    while _idle:
        _idle.pop().close()
