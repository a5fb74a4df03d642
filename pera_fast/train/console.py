"""Messages and progress of a run for the user: a bar on a terminal, else a line now and then; train.log."""

import contextlib
import logging
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from pera_fast.errors import UserError
from pera_fast.progress import is_terminal
from pera_fast.train.metrics import Metrics

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

LOGGER = logging.getLogger("pera_fast")
PLAIN_SECONDS = 15.0  # between progress lines in the log and where there is no terminal
_PROGRESS = {"progress": True}


class _Console(logging.Handler):
    """Messages to stdout, warnings and worse to stderr, whatever stands there now (a live bar redirects them)."""

    def __init__(self, show_progress_lines: bool):
        super().__init__()
        self.show_progress_lines = show_progress_lines

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "progress", False) and not self.show_progress_lines:
            return
        try:
            bad = record.levelno >= logging.WARNING
            text = f"{record.levelname.lower()}: {record.getMessage()}" if bad else record.getMessage()
            print(text, file=sys.stderr if bad else sys.stdout, flush=True)
        except Exception:  # a notebook's or a test's stream raises what it likes
            pass  # nobody reads any more: no reason to stop training


class _QuietFile(logging.FileHandler):
    """A log file that a full disk silences instead of ending the run or flooding the screen with tracebacks."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what is still buffered does not fit either
            super().close()


class RunLog:
    """Context manager: while open, the package's messages go to the console and to a file.

    Args:
        path: train.log, appended to; None on ranks other than 0, which only say warnings.
    """

    def __init__(self, path: Path | None):
        bar = path is not None and is_terminal(sys.stdout)
        self._handlers: list[logging.Handler] = []
        self._file: logging.Handler | None = None
        console = _Console(show_progress_lines=not bar)
        if path is None:
            console.setLevel(logging.WARNING)
        if not any(type(handler) is logging.StreamHandler for handler in logging.getLogger().handlers):
            self._handlers.append(console)  # a program that has set up logging to the console gets each line once
        if path is not None:
            self._file = _QuietFile(path, encoding="utf-8")
            self._file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            self._handlers.append(self._file)
        self._level = LOGGER.level

    def __enter__(self) -> "RunLog":
        if LOGGER.getEffectiveLevel() > logging.INFO:
            LOGGER.setLevel(logging.INFO)
        for handler in self._handlers:
            LOGGER.addHandler(handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._file is not None:  # the caller tells the user; the file should know as well
            info = None if isinstance(error, UserError) else (type(error), error, trace)
            record = LOGGER.makeRecord(LOGGER.name, logging.ERROR, __file__, 0, "%s", (error or kind,), info)
            self._file.handle(record)
        for handler in self._handlers:
            LOGGER.removeHandler(handler)
            handler.close()
        LOGGER.setLevel(self._level)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def describe(metrics: Metrics, seconds_left: float | None) -> str:
    """The numbers of a step that are worth a glance, in one line."""
    loss, rate = metrics["loss"], metrics["images_per_s"]
    words = [
        f"loss {loss:.4f}" if loss is not None else "loss not finite",
        f"{rate:.1f} images/s" if rate >= 1 else f"{rate:.2g} images/s",
        f"data wait {100 * metrics['data_wait']:.0f}%",
        f"{metrics['mem']:.0f} MiB",
    ]
    if metrics.get("mfu") is not None:
        words.append(f"MFU {100 * metrics['mfu']:.0f}%")
    if metrics.get("probe_knn") is not None:
        words.append(f"kNN {100 * metrics['probe_knn']:.1f}%")
    if seconds_left is not None:
        words.append(f"{_duration(seconds_left)} left")
    return "  ".join(words)


class Progress:
    """Progress of a run: `update` after every step. Does nothing on ranks other than 0."""

    def __init__(self, steps: int, done: int, active: bool):
        self._steps, self._first, self._active = steps, done, active
        self._began = time.monotonic()
        self._said = -float("inf")
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._probe: float | None = None  # the last one's accuracy

    def __enter__(self) -> "Progress":
        if self._active and is_terminal(sys.stdout):
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
            self._bar.start()
            self._task = self._bar.add_task("", total=self._steps, completed=self._first)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, metrics: Metrics) -> None:
        """Shows the metrics of the step that makes `done` steps done."""
        if not self._active:
            return
        self._probe = metrics.get("probe_knn", self._probe)
        if self._probe is not None:
            metrics = {**metrics, "probe_knn": self._probe}
        now = time.monotonic()
        here = (
            done - self._first
        )  # steps of this process; the first one is slower, and with one there is no better guess
        left = (now - self._began) / here * (self._steps - done) if here else None
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, description=describe(metrics, left))
        if now - self._said >= PLAIN_SECONDS or done == self._steps:
            self._said = now
            LOGGER.info("step %d/%d  %s", done, self._steps, describe(metrics, left), extra=_PROGRESS)
