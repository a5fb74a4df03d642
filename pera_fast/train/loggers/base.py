"""Interface of a logger, and the facts of a run that loggers need."""

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pera_fast.durable import read_object, whole_file

PROJECT = "pera-fast"  # or experiment, unless the environment names one
Ending = Literal["finished", "stopped", "failed"]
_writing = threading.Lock()  # of loggers.json: each logger writes it from its own thread


class Logger(Protocol):
    """A logger that has been started. It may raise whatever it likes, and take its time: it runs in a thread."""

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes lines of metrics.jsonl, in order; several may be of one step."""

    def finish(self, ending: Ending, final: Mapping[str, Any]) -> None:
        """Takes how the run ended and the last value of every metric, and sends what is left."""


@dataclass(frozen=True)
class About:
    """A run, as loggers present it.

    Attributes:
        folder: the run folder, which exists; its name is the run's.
        done: steps done before this process.
        settings: {dotted key: value} of the configuration.
    """

    folder: Path
    done: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.folder.resolve().name

    def known(self, logger: str) -> dict[str, str]:
        """Names under which an earlier process of this run was logged; empty for a new run."""
        try:
            told = read_object(self._file).get(logger)
        except (OSError, ValueError):
            return {}
        return {str(key): str(value) for key, value in told.items()} if isinstance(told, dict) else {}

    def keep(self, logger: str, names: Mapping[str, str]) -> None:
        """Keeps names in the run folder, so that a resumed run goes on in the same curves. Raises OSError."""
        with _writing:
            try:
                told = read_object(self._file)
            except (OSError, ValueError):
                told = {}
            with whole_file(self._file) as partial:
                partial.write_text(json.dumps({**told, logger: dict(names)}, indent=1) + "\n", encoding="utf-8")

    @property
    def _file(self) -> Path:
        return self.folder / "loggers.json"


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The values of a line of metrics.jsonl that can be drawn over its step."""
    return {
        key: value
        for key, value in metrics.items()
        if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def reason(error: BaseException) -> str:
    """An error in one line; with its kind where its own words may not say it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
