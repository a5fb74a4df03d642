"""Handles signals that stop a run: the first asks the loop to finish its step and save, the second ends it at once.

SIGINT is Ctrl-C, SIGTERM what schedulers send, SIGUSR1 what they send some time before (`sbatch --signal=USR1@120`),
SIGHUP what a terminal sends that goes away.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

# torchrun and terminals may deliver one request twice (to the process and to its group); a person is slower than this.
SAME_REQUEST_SECONDS = 0.5
# Where ranks got different ones, the last of them that came to any rank decides the exit code.
STOPPING = (signal.SIGHUP, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], object] | int | None  # as signal.signal takes and gives it


def _handled() -> list[signal.Signals]:
    """The stopping signals to handle here: none outside of the main thread, and no SIGHUP that is ignored (nohup)."""
    if threading.current_thread() is not threading.main_thread():
        return []  # Python allows no handlers there
    return [s for s in STOPPING if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]


@contextmanager
def exit_on_termination() -> Iterator[None]:
    """Inside, a stopping signal raises SystemExit(128 + its number): for set-up, with nothing to save yet.

    Unlike the default, which ends the process on the spot, this leaves through `finally`: worker processes are ended.
    SIGINT raises KeyboardInterrupt, as ever.
    """

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, leave) for number in _handled() if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def exit_code(asked: Sequence[bool]) -> int:
    """Exit code for the signals that came, in the order of `STOPPING`; 0 if none did."""
    came = [128 + number for number, flag in zip(STOPPING, asked, strict=True) if flag]
    return came[-1] if came else 0


class StopRequest:
    """Context manager: while it is open, the first stopping signal sets `signal` instead of ending the process.

    Handlers are put back on leaving. Outside of the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._time = 0.0
        self._previous: dict[int, Handler] = {}

    @property
    def exit_code(self) -> int:
        """128 plus the number of the signal (130 for SIGINT, 143 for SIGTERM), 0 if nothing was asked."""
        return 128 + self.signal if self.signal else 0

    def asked(self) -> tuple[bool, ...]:
        """Whether each of `STOPPING` came."""
        return tuple(self.signal == number for number in STOPPING)

    def __enter__(self) -> "StopRequest":
        for number in _handled():
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
