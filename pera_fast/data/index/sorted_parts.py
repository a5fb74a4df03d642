"""External sort of tables too large for memory: sorted parts on disk, merged one range of paths at a time."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute

pc: Any = pyarrow.compute  # made when it is imported: type checkers see none of its functions
Tables = Iterator[pa.Table]
_ROWS_AT_A_TIME = 2**17  # of all streams together
_WRITTEN_ROWS = 2**12  # of a record batch in a part
_NO_ROWS = pa.table({})


class SortedParts:
    """Record batches in any order come out sorted by path; only `rows` of them are in memory at a time.

    Args:
        folder: where the parts are kept; it exists, and nobody else writes there.
        schema: of the batches, with a string column `path`.
        rows: of one part.
    """

    def __init__(self, folder: Path, schema: pa.Schema, rows: int = 2**18):
        self._folder, self._schema, self._rows = folder, schema, rows
        self._batches: list[pa.RecordBatch] = []
        self._held = 0
        self._parts: list[Path] = []

    def add(self, batch: pa.RecordBatch) -> None:
        """Takes a batch. Raises OSError if a part cannot be written."""
        self._batches.append(batch)
        self._held += batch.num_rows
        if self._held >= self._rows:
            self._write()

    def streams(self) -> list[Tables]:
        """One stream a part, each in the order of the paths. Nothing can be added any more."""
        if self._held:
            self._write()
        return [_read(part) for part in self._parts]

    def delete(self) -> None:
        """Removes the parts."""
        for part in self._parts:
            part.unlink(missing_ok=True)

    def _write(self) -> None:
        table = pa.Table.from_batches(self._batches, self._schema).sort_by("path")
        self._batches, self._held = [], 0
        part = self._folder / f"listed-{len(self._parts):05d}.arrow"
        self._parts.append(part)
        with pa.OSFile(os.fspath(part), "wb") as file, pa.ipc.new_stream(file, self._schema) as writer:
            writer.write_table(table, max_chunksize=_WRITTEN_ROWS)


def _read(part: Path) -> Tables:
    with pa.OSFile(os.fspath(part), "rb") as file, pa.ipc.open_stream(file) as reader:
        for batch in reader:
            yield pa.Table.from_batches([batch])


class _Stream:
    """A stream and what was read of it but not handed on."""

    def __init__(self, tables: Tables, rows: int):
        self._tables, self._rows = tables, rows
        self.head = next(tables, None)
        self._fill()

    def _fill(self) -> None:
        parts = [self.head] if self.head is not None and self.head.num_rows else []
        while sum(part.num_rows for part in parts) < self._rows and (more := next(self._tables, None)) is not None:
            parts.append(more)
        self.head = pa.concat_tables(parts).combine_chunks() if parts else None

    @property
    def last(self) -> str:
        assert self.head is not None
        return self.head["path"][-1].as_py()

    def take(self, bound: str) -> pa.Table:
        """The rows up to a path."""
        taken = []
        while self.head is not None and self.head["path"][0].as_py() <= bound:
            count = self._count(bound)
            taken.append(self.head.slice(0, count))
            self.head = self.head.slice(count)
            if self.head.num_rows < self._rows // 2:
                self._fill()
        return pa.concat_tables(taken) if taken else _NO_ROWS

    def _count(self, bound: str) -> int:
        assert self.head is not None
        paths, low, high = self.head["path"], 0, self.head.num_rows
        while low < high:
            middle = (low + high) // 2
            if paths[middle].as_py() <= bound:
                low = middle + 1
            else:
                high = middle
        return low


def side_by_side(*groups: Sequence[Tables]) -> Iterator[list[pa.Table | None]]:
    """Groups of streams, a range of paths at a time: per group a table sorted by path, or None if it has no row there.

    All rows of one path, whatever stream they come from, are in one range. Among equal paths the rows keep the order of
    the group's streams.

    Args:
        groups: streams of tables with a string column `path`, each stream in its order; one schema a group.
    """
    rows = max(2 * _WRITTEN_ROWS, _ROWS_AT_A_TIME // max(1, sum(map(len, groups))))
    opened = [[_Stream(tables, rows) for tables in group] for group in groups]
    while heads := [stream.last for group in opened for stream in group if stream.head is not None]:
        bound = min(heads)
        yield [_merged([s.take(bound) for s in group if s.head is not None]) for group in opened]


def _merged(tables: list[pa.Table]) -> pa.Table | None:
    tables = [table for table in tables if table.num_rows]
    if len(tables) <= 1:
        return tables[0] if tables else None
    table = pa.concat_tables(tables).combine_chunks()
    return table.take(pc.sort_indices(table["path"]))  # Arrow's sort is stable
