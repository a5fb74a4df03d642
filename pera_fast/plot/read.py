"""Reads metrics.jsonl chunk by chunk: memory stays the same however long the run is."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

CHUNK = 4 << 20  # bytes

Columns = dict[str, np.ndarray]  # float64 [lines] each; nan where a line has no such number


def read_columns(path: Path, chunk: int = CHUNK) -> Iterator[Columns]:
    """The numbers of a file of JSON lines, some thousand lines at a time. Lines without a step are left out.

    A line that is torn, as the last one of a run that was killed, is left out too, and so are values that are no
    numbers.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        rest = b""
        while block := file.read(chunk):
            whole, newline, tail = (rest + block).rpartition(b"\n")
            rest = tail
            if newline and (columns := _parse(whole + newline)):
                yield columns
        if rest.strip() and (columns := _parse(rest)):
            yield columns


def _parse(text: bytes) -> Columns:
    found = _by_arrow(text)
    columns = _by_line(text) if found is None else found
    if "step" not in columns:
        return {}
    there = np.isfinite(columns["step"])
    kept = {key: values[there] for key, values in columns.items()}
    return {key: values for key, values in kept.items() if np.isfinite(values).any()}


def _by_arrow(text: bytes) -> Columns | None:
    """All lines at once, by pyarrow; None if one of them is not as it should be."""
    import pyarrow as pa
    from pyarrow.json import ParseOptions, ReadOptions, read_json

    try:  # one block: pyarrow does not take lines that lie across two
        options = ReadOptions(use_threads=False, block_size=len(text) + 1)
        table = read_json(io.BytesIO(text), options, ParseOptions(newlines_in_values=False))
        names = [f.name for f in table.schema if pa.types.is_integer(f.type) or pa.types.is_floating(f.type)]
        if len(set(table.column_names)) < table.num_columns:
            return None
        return {name: _floats(table.column(name)) for name in names}
    except (pa.ArrowException, ValueError):
        return None


def _floats(column: object) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.fill_null(pc.cast(column, pa.float64()), float("nan")).to_numpy()


def _by_line(text: bytes) -> Columns:
    rows = [row for row in map(_object, text.splitlines()) if row is not None]
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: np.array([_number(row.get(key)) for row in rows]) for key in keys}


def _object(line: bytes) -> dict[str, object] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _number(value: object) -> float:
    try:
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else float("nan")
    except OverflowError:
        return float("nan")
