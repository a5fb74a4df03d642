"""Writes rows to a file as they are measured: a line of JSON for the machine, then one for each benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


class RowWriter:
    """A pytest plugin that writes {"row": ...}, {"skipped": bench, "reason": ...} or {"failed": ...}."""

    def __init__(self, path: Path, head: dict[str, Any]):
        self._path = path
        path.write_text("", encoding="utf-8")
        self._write(head)

    def _write(self, entry: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._write({"benches": len(session.items)})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        bench = report.nodeid.partition("[")[2].removesuffix("]")
        if report.when == "call":
            for name, row in report.user_properties:
                self._write({name: row})
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._write({"skipped": bench, "reason": reason.removeprefix("Skipped: ")})
        if report.failed:
            self._write({"failed": bench, "reason": _telling(report.longreprtext)})


def _telling(trace: str) -> str:
    """The line of a traceback that says what was wrong."""
    lines = [" ".join(line[1:].split()) for line in trace.splitlines() if line.startswith("E  ")]
    return lines[0] if lines else " ".join(trace.split())[-300:]
