"""A target of fuzzing: a kind of file, its originals, and what must hold for each mutation of them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np

from pera_fast.errors import UserError


class FoundError(Exception):
    """A mutation broke what must hold; the message says how."""


class Target:
    """Makes and judges cases of one kind of file.

    Args:
        folder: of its own; `self.case` in it holds the files of the case, which are kept if the case finds something.
    """

    name: ClassVar[str]
    covers: ClassVar[str]  # what is mutated and which functions read it

    def __init__(self, folder: Path):
        self.folder, self.case = folder, folder / "case"
        self.case.mkdir(parents=True, exist_ok=True)

    def run(self, rng: np.random.Generator) -> str:
        """One case; returns its outcome in a word. Whatever it raises is a finding."""
        raise NotImplementedError

    def workers(self) -> list[int]:
        """Ids of its processes, whose memory counts."""
        return []


def judged(action: Callable[[], str]) -> str:
    """The action's outcome, or "refused" where it raises a UserError of one line."""
    try:
        return action()
    except UserError as error:
        told = str(error)
        if "\n" in told or not told.strip() or len(told) > 2000:
            raise FoundError(f"refused, but not with one line: {told[:300]!r}") from None
        return "refused"


def expect(holds: bool, what: str) -> None:
    """Raises FoundError unless it holds."""
    if not holds:
        raise FoundError(what)


def emptied(folder: Path) -> Path:
    """The folder, without the files of the last case."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            os.unlink(path)
    return folder
