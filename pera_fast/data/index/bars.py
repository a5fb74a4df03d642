"""Progress bars of an index on a terminal."""

import contextlib
from collections.abc import Iterator
from typing import Any

from pera_fast.progress import progress_display


class Bars:
    """Progress on a terminal."""

    def __init__(self, display: Any = None):
        self._display = display
        self._scan = self._check = None
        if display is not None:
            self._scan = display.add_task("listing", total=None)

    def scanned(self, found: int) -> None:
        if self._display is not None:
            self._display.update(self._scan, completed=found)

    def start_check(self, total: int) -> None:
        if self._display is not None and total:
            self._check = self._display.add_task("checking", total=total)

    def done(self, files: int, failed: int) -> None:
        """Advance the bar by ``files``; ``failed`` is the total of unreadable ones."""
        if self._display is not None and self._check is not None:
            told = f"checking ({failed} not readable)" if failed else "checking"
            self._display.update(self._check, advance=files, description=told)


@contextlib.contextmanager
def bars(wanted: bool) -> Iterator[Bars]:
    """Bars of an index, shown on a terminal if wanted."""
    with progress_display(wanted) as display:
        yield Bars(display)
