"""A progress bar on a terminal, nothing elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(text: str, total: int, done: int = 0, wanted: bool = True) -> Iterator[Callable[[float], None]]:
    """A function that moves the bar on by a number.

    Args:
        text: what is counted.
        total: where it ends.
        done: where it begins.
        wanted: False: nothing is shown.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not wanted or not console.is_terminal:
        yield lambda step: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as display:
        task = display.add_task(text, total=total, completed=done)
        yield lambda step: display.advance(task, step)
