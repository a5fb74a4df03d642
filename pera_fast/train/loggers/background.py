"""Runs a logger in a thread: a step only appends to a list, and whatever fails or hangs there stays there."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from pera_fast.train.loggers.base import About, Ending, Logger, reason

log = logging.getLogger(__name__)

PAUSE_SECONDS = 1.0  # between two deliveries: many steps at once cost a database or a server little more than one
MOST_ROWS = 10_000  # that wait for a slow logger, about 1 KiB each; later ones are dropped
# Seconds that the end of a run waits for its loggers. A scheduler that stops a run gives it little time.
PATIENCE: dict[Ending, float] = {"finished": 60.0, "stopped": 20.0, "failed": 20.0}


class Background:
    """A logger in a thread of its own, started with the first step. After a failure it does nothing more.

    Args:
        name: as in `train.loggers`, for messages.
        start: makes the logger; called in the thread.
        about: the run.
    """

    def __init__(self, name: str, start: Callable[[About], Logger], about: About):
        self.name = name
        self._start, self._about = start, about
        self._rows: deque[Mapping[str, Any]] = deque()
        self._dropped = 0
        self._end = threading.Event()
        self._ending: Ending = "finished"
        self._final: Mapping[str, Any] = {}
        self._off = False
        self._thread: threading.Thread | None = None

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Takes a line of metrics.jsonl, which must not be changed afterwards. Neither waits nor raises."""
        if self._off:
            return
        if len(self._rows) >= MOST_ROWS:
            self._dropped += 1
            return
        self._rows.append(metrics)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"logger {self.name}", daemon=True)
            try:
                self._thread.start()
            except RuntimeError as error:  # the machine starts no more threads
                self._fail(error)

    def ask_to_finish(self, ending: Ending, final: Mapping[str, Any]) -> None:
        """Tells the thread that there will be no more steps."""
        self._ending, self._final = ending, final
        self._end.set()

    def wait(self, deadline: float) -> None:
        """Waits for the thread, at most until `time.monotonic()` is at the deadline."""
        thread, self._thread = self._thread, None
        if thread is None or thread.ident is None:
            return
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive() and not self._off:
            self._off = True
            log.warning("%s: does not answer; what it has not got yet is in metrics.jsonl only", self.name)
        elif self._dropped:
            log.warning("%s: was too slow; %d steps are in metrics.jsonl only", self.name, self._dropped)

    def _run(self) -> None:
        try:
            logger = self._start(self._about)
            while not self._off:
                ended = self._end.wait(PAUSE_SECONDS)
                if rows := [self._rows.popleft() for _ in range(len(self._rows))]:
                    logger.log(rows)
                if ended:
                    logger.finish(self._ending, self._final)
                    return
        except BaseException as error:  # also SystemExit: whatever a logger does, the run goes on
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        told, self._off = self._off, True
        self._rows.clear()
        if not told:
            log.warning("%s: failed, training goes on without it: %s", self.name, reason(error))


def finish(loggers: list[Background], ending: Ending, final: Mapping[str, Any]) -> None:
    """Ends loggers, all at the same time, and waits for them a bounded time."""
    for logger in loggers:
        logger.ask_to_finish(ending, final)
    deadline = time.monotonic() + PATIENCE[ending]
    for logger in loggers:
        logger.wait(deadline)
