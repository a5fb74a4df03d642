"""Progress bars, which appear on terminals only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where a bar is drawn: short commands do not wait for it
    from rich.progress import Progress


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal; not if it is None (closed), or any object that cannot say."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError, OSError):
        return False


@contextmanager
def progress_display(wanted: bool = True, stderr: bool = True, elapsed: bool = False) -> Iterator[Progress | None]:
    """A display of bars with text, count and time, which goes away at its end.

    Args:
        wanted: show it, if there is a terminal.
        stderr: draw on stderr, else on stdout.
        elapsed: show the time that has passed rather than an estimate of what is left.

    Yields:
        The display, to which tasks are added; None where nothing is shown.
    """
    from rich.console import Console

    console = Console(stderr=stderr)
    if not wanted or not console.is_terminal:
        yield None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    time = TimeElapsedColumn() if elapsed else TimeRemainingColumn()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), time
    with Progress(*columns, console=console, transient=True) as display:
        yield display


@contextmanager
def progress_bar(text: str, total: int, done: int = 0, wanted: bool = True) -> Iterator[Callable[[float], None]]:
    """One bar on stderr.

    Args:
        text: what is counted.
        total: where it ends.
        done: where it begins.
        wanted: show it, if there is a terminal.

    Yields:
        A function that moves the bar on by a number.
    """
    with progress_display(wanted) as display:
        if display is None:
            yield lambda step: None
            return
        task = display.add_task(text, total=total, completed=done)
        yield lambda step: display.advance(task, step)
