"""Handles SIGINT and SIGTERM: the first asks the loop to finish its step and save, the second stops at once."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# torchrun and terminals may deliver one request twice (to the process and to its group); a person is slower than this.
SAME_REQUEST_SECONDS = 0.5
Handler = Callable[[int, FrameType | None], object] | int | None  # as signal.signal takes and gives it


@contextmanager
def exit_on_termination() -> Iterator[None]:
    """Inside, SIGTERM raises SystemExit(143), as SIGINT raises KeyboardInterrupt: for set-up, with nothing to save yet.

    Unlike the default, which ends the process on the spot, this leaves through `finally`: worker processes are ended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class StopRequest:
    """Context manager: while it is open, the first SIGINT or SIGTERM sets `signal` instead of ending the process.

    Handlers are put back on leaving. Outside of the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._time = 0.0
        self._previous: dict[int, Handler] = {}

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM, 0 if nothing was asked."""
        return 128 + self.signal if self.signal else 0

    def asked(self) -> tuple[bool, bool]:
        """Whether (SIGINT, SIGTERM) came."""
        return self.signal == signal.SIGINT, self.signal == signal.SIGTERM

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._time = number, now
        elif now - self._time > SAME_REQUEST_SECONDS:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
