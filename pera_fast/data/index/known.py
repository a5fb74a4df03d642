"""Looks up files in earlier manifests, so that only new and changed ones are checked."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from pera_fast.data.decoding.probe import ProbeSettings
from pera_fast.data.files.manifest import SCHEMA, StoredManifest
from pera_fast.data.index.checks import Batch, batches
from pera_fast.data.index.sorted_parts import Tables
from pera_fast.errors import UserError

pc: Any = pyarrow.compute  # made when it is imported: type checkers see none of its functions
_log = logging.getLogger("pera_fast")
FIRST_REASONS = 3  # that are told


@dataclass
class Counts:
    """Counts of files by their state."""

    kept: int = 0
    checked: int = 0
    gone: int = 0
    readable: int = 0
    failed: int = 0
    reasons: list[tuple[str, str]] = field(default_factory=list)  # (path, reason) of the first that are not readable

    def add(self, rows: pa.Table, checked: bool) -> None:
        """Counts rows of the manifest, which were checked just now or known already."""
        readable = pc.sum(rows["ok"]).as_py() or 0
        self.readable += readable
        self.failed += rows.num_rows - readable
        if checked:
            self.checked += rows.num_rows
        else:
            self.kept += rows.num_rows
        if readable < rows.num_rows and len(self.reasons) <= FIRST_REASONS:
            bad = rows.filter(pc.invert(rows["ok"])).slice(0, FIRST_REASONS + 1)
            self.reasons += zip(bad["path"].to_pylist(), bad["reason"].to_pylist(), strict=True)


def tasks(ranges: Iterator[list[pa.Table | None]], counts: Counts) -> Iterator[Batch | pa.Table]:
    """Per range of paths: batches to check, then the rows of what need not be, perhaps none."""
    for listed, known in ranges:
        if listed is not None:
            listed = _without_repeats(listed)  # of folders that were listed again
        if known is not None:
            known = _without_repeats(known)
        if listed is None:
            counts.gone += known.num_rows if known is not None else 0
            continue
        if known is None:
            yield from batches(listed)
            yield SCHEMA.empty_table()
            continue
        at = pc.index_in(listed["path"], value_set=known["path"])
        counts.gone += known.num_rows - (len(at) - at.null_count)
        old = known.take(at)
        same = pc.equal(listed["reason"], "")
        for name in ("size", "mtime_ns", "offset"):
            same = pc.and_(same, pc.equal(old[name], listed[name]))
        same = pc.fill_null(same, False)
        yield from batches(listed.filter(pc.invert(same)))
        yield old.filter(same)


def _without_repeats(rows: pa.Table) -> pa.Table:
    """First row of each path; equal paths are neighbours."""
    paths = rows["path"].combine_chunks()
    if len(paths) < 2:
        return rows
    new = np.ones(len(paths), np.bool_)
    new[1:] = pc.not_equal(paths[1:], paths[:-1]).to_numpy(zero_copy_only=False)
    return rows if new.all() else rows.filter(pa.array(new))


def _decoded_alike(rows: pa.Table, now: ProbeSettings) -> pa.ChunkedArray:
    """Readable files that the same decoder reads with the settings of now: DALI is asked about none of them."""
    by_others = pc.and_(rows["ok"], pc.is_in(rows["decoder"], value_set=pa.array(["rasterio", "pillow"])))
    if not now.encoded:
        return by_others
    shallow = pc.is_in(rows["dtype"], value_set=pa.array(["", "bool", "uint8"]))
    return pc.and_(by_others, pc.invert(shallow))


def _has_bands(rows: pa.Table, now: ProbeSettings) -> pa.ChunkedArray:
    """Files that have the bands of now, as far as their row says; names of bands do not stand there."""
    stored, numbers = rows["channels"], [band for band in now.bands if isinstance(band, int)]
    if len(numbers) < len(now.bands):
        enough = pc.less(stored, 0)
    elif numbers:
        enough = pc.greater_equal(stored, max(numbers))
    elif now.channels in (1, 3):
        enough = pc.greater_equal(stored, 1)  # colour and gray convert
    else:
        enough = pc.equal(stored, now.channels)
    return pc.and_(enough, pc.invert(pc.match_substring(rows["scale"], ",")))  # one scale for each band


class Known:
    """Rows of earlier manifests that need no new check while size and mtime stay.

    Args:
        settings: how files are checked now; of other settings those rows are of use that would come out the same.
        version: DALI's, now.
    """

    def __init__(self, settings: ProbeSettings, version: str):
        self._settings, self._version = settings, version

    def manifest(self, target: Path, replace: bool) -> list[Tables]:
        """The last manifest's rows. What is no manifest is overwritten only if told so: the path may be a slip."""
        if not target.exists():
            return []
        try:
            StoredManifest(target).__exit__()
        except UserError as error:
            if not replace:
                raise UserError(f"{error}; delete it or give another data.index") from error
            _log.warning("%s; it is written anew", error)
            return []
        return [self._rows(target)]

    def parts(self, paths: Sequence[Path]) -> Tables:
        """The rows of an attempt that was not finished. What is damaged is passed over: it is checked again."""
        for path in paths:
            with contextlib.suppress(UserError):
                yield from self._rows(path)

    def _rows(self, path: Path) -> Tables:
        with StoredManifest(path) as stored:
            before, now = (replace(settings, verify=True) for settings in (stored.settings, self._settings))
            others = replace(before, scaled=now.scaled, channels=now.channels, bands=now.bands)
            if others != now or stored.dali != self._version:
                return
            for rows in stored.stream():
                reusable = self._reusable(rows)
                if before != now:
                    reusable = pc.and_(reusable, _decoded_alike(rows, now))
                if (before.channels, before.bands) != (now.channels, now.bands):
                    reusable = pc.and_(reusable, _has_bands(rows, now))
                kept = rows.filter(reusable)
                if kept.num_rows:
                    yield kept

    def _reusable(self, rows: pa.Table) -> pa.ChunkedArray:
        """A header is not enough where a full check is asked for; what could not be opened may have become readable."""
        opened = pc.greater_equal(rows["size"], 0)
        if not self._settings.verify:
            return opened
        return pc.and_(opened, pc.or_(pc.not_equal(rows["decoder"], ""), pc.invert(rows["ok"])))
