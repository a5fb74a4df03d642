"""Sorting on disk and reading side by side give what sorting in memory gives."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pera_fast.data.index import sorted_parts
from pera_fast.data.index.sorted_parts import SortedParts, side_by_side

SCHEMA = pa.schema([("path", pa.string()), ("value", pa.int64())])
NAMES = st.text(st.sampled_from("ab/-.é😀"), max_size=4)


def table(paths, first=0):
    return pa.table({"path": paths, "value": list(range(first, first + len(paths)))}, schema=SCHEMA)


def stream(paths, first, size):
    whole = table(sorted(paths), first)
    return iter([whole.slice(start, size) for start in range(0, len(paths), size)])


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch):
    monkeypatch.setattr(sorted_parts, "_WRITTEN_ROWS", 2)
    monkeypatch.setattr(sorted_parts, "_ROWS_AT_A_TIME", 8)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(NAMES, max_size=30), max_size=4), st.lists(st.lists(NAMES, max_size=30), max_size=3))
def test_ranges_cover_everything_in_order_and_split_no_path(left, right):
    groups = [[stream(paths, 100 * number, 1 + number) for number, paths in enumerate(part)] for part in (left, right)]
    seen, last = [[], []], None
    for parts in side_by_side(*groups):
        paths = [part["path"].to_pylist() if part is not None else [] for part in parts]
        together = sorted(paths[0] + paths[1])
        assert together
        assert last is None or last < together[0]
        last = together[-1]
        for side, part in zip(seen, parts, strict=True):
            side += part.to_pylist() if part is not None else []
    for rows, streams in zip(seen, (left, right), strict=True):
        wanted = [row for number, paths in enumerate(streams) for row in table(sorted(paths), 100 * number).to_pylist()]
        assert rows == sorted(wanted, key=lambda row: row["path"])  # stable: equal paths keep the streams' order


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(NAMES, max_size=9), max_size=9))
def test_parts_are_sorted_and_hold_everything(tmp_path_factory, batches):
    folder = tmp_path_factory.mktemp("parts")
    parts = SortedParts(folder, SCHEMA, rows=10)
    for paths in batches:
        parts.add(table(paths).to_batches()[0] if paths else pa.record_batch([[], []], schema=SCHEMA))
    rows = [row for (part,) in side_by_side(parts.streams()) for row in part["path"].to_pylist()]
    assert rows == sorted(path for paths in batches for path in paths)
    parts.delete()
    assert list(folder.iterdir()) == []
