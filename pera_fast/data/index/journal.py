"""Crash journal of an unfinished index: kept beside the manifest, taken up by the next attempt."""

import contextlib
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from pera_fast.data.decoding.probe import ProbeSettings
from pera_fast.data.files.manifest import ManifestWriter, not_writable
from pera_fast.errors import UserError

_PART = re.compile(r"([0-9]{6,})-[0-9]{6,}\.parquet")  # attempt, part
_SECONDS = 10.0  # of work that a kill can cost
_ROWS = 2**15  # held before they are written


class Journal:
    """Rows on their way into a manifest, in small files of its kind. A context manager that writes what it holds.

    Every attempt adds its rows in the order of their paths, so an attempt is one sorted stream.

    Args:
        target: the manifest.
        root, settings, dali: what it says about itself.
    """

    def __init__(self, target: Path, root: Path, settings: ProbeSettings, dali: str):
        self.folder = target.with_name(f".{target.name}.unfinished")
        self._target, self._about = target, (root, settings, dali)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(not_writable(target, error)) from error
        for scrap in [*self.folder.glob("*.arrow"), *self.folder.glob(".*")]:  # of an attempt that was killed
            scrap.unlink(missing_ok=True)
        self._attempt = 1 + max((attempt for attempt, _ in self._parts()), default=-1)
        self._written = 0
        self._held: list[pa.Table] = []
        self._flushed = time.monotonic()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder.exists():
            with contextlib.suppress(UserError):  # a full disk: whatever ends the index is the thing to tell
                self._flush()

    def earlier(self) -> list[list[Path]]:
        """The parts of each earlier attempt, the newest attempt first; each is a manifest."""
        attempts: dict[int, list[Path]] = {}
        for attempt, path in self._parts():
            if attempt < self._attempt:
                attempts.setdefault(attempt, []).append(path)
        return [attempts[attempt] for attempt in sorted(attempts, reverse=True)]

    def add(self, rows: pa.Table) -> None:
        """Rows (SCHEMA) that have just been found out. Raises UserError if they cannot be written."""
        self._held.append(rows)
        late = time.monotonic() - self._flushed > _SECONDS
        if late or sum(table.num_rows for table in self._held) >= _ROWS:
            self._flush()

    def delete(self) -> None:
        """Removes all attempts: the manifest holds what they had."""
        self._held = []
        shutil.rmtree(self.folder, ignore_errors=True)

    def _parts(self) -> Iterator[tuple[int, Path]]:
        for path in sorted(self.folder.glob("*.parquet")):
            if name := _PART.fullmatch(path.name):
                yield int(name[1]), path

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        if not self._held:
            return
        rows, self._held = pa.concat_tables(self._held), []
        name = f"{self._attempt:06d}-{self._written:06d}.parquet"
        with ManifestWriter(self.folder / name, *self._about) as writer:
            writer.write(rows)
            writer.commit()
        self._written += 1
