"""The list of files that a run could not use."""

import csv
import io
import logging
import os
import threading
from pathlib import Path

from pera_fast.durable import lock

_log = logging.getLogger("pera_fast")
_COLUMNS = ("file", "reason")


class SkippedFiles:
    """skipped.csv (columns file, reason): every file once, also over resumes and over ranks that share the file.

    Args:
        path: the CSV file; made with the first entry.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._known: set[str] = set()
        self._read_up_to = 0
        self._lock = threading.Lock()

    def add(self, file: str | os.PathLike[str], reason: str) -> bool:
        """Enters a file and logs one warning, unless the file is in the list already. Returns whether it was new."""
        name = os.fspath(file)
        with self._lock:
            if name in self._known:
                return False
            try:
                if not self._enter(name, reason):
                    return False
            except OSError as error:  # a full disk: the log has the line, and an unreadable file still ends no run
                self._known.add(name)
                _log.warning("cannot write %s: %s", self.path, error.strerror or error)
        _log.warning("skipped %s: %s", name, reason)
        return True

    def _enter(self, name: str, reason: str) -> bool:
        # newline="" leaves line ends to csv; a byte that is no text must not end the run
        with open(self.path, "a+", newline="", encoding="utf-8", errors="backslashreplace") as file:
            lock(file, wait=True)  # some network file systems have no locks: at worst a file appears twice
            file.seek(self._read_up_to)  # what other ranks, or this run before it was resumed, have entered
            self._known.update(row[0] for row in csv.reader(io.StringIO(file.read(), newline="")) if row)
            new = name not in self._known
            if new:
                writer = csv.writer(file, lineterminator="\n")
                if file.tell() == 0:
                    writer.writerow(_COLUMNS)
                writer.writerow((name, reason))
                file.flush()
            self._known.add(name)
            self._read_up_to = file.tell()
        return new
