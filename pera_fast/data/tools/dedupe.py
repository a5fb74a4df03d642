"""`pera-fast data dedupe`: reports near-duplicates among the readable images of a folder; moves them on request."""

import csv
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pera_fast.cores import default_workers
from pera_fast.data.ahead import map_ahead
from pera_fast.data.decoding import decode
from pera_fast.data.decoding.probe import os_reason, read_file
from pera_fast.data.files.manifest import Manifest, ReadableFiles
from pera_fast.data.files.shards import locate, place_of
from pera_fast.data.index.build import build_index
from pera_fast.data.tools.fingerprint import GRID, fingerprint, read_small
from pera_fast.data.tools.similar import MAX_BITS, distances, similar_pairs
from pera_fast.errors import UserError
from pera_fast.paths import new_file, refuse_inside
from pera_fast.progress import progress_bar
from pera_fast.storage import ClosedError, MachineError, Storage

_log = logging.getLogger("pera_fast")
BITS = 5
LEVELS = 12  # of 255, by which a mean of a part of the image may differ
_AHEAD, _FILES = 4, 64  # calls under way for each thread; files of a call
_COLUMNS = ("group", "action", "file", "width", "height", "bytes", "bits")


@dataclass
class Duplicates:
    """Groups of near-duplicates. Every duplicate is alike to the image that its group keeps, not only to another."""

    files: ReadableFiles
    kept: np.ndarray  # int64 [N]: row that each row is a duplicate of; its own, if it is kept
    bits: np.ndarray  # int64 [N]: by which the hashes of the two differ
    failed: int  # files that could not be read again

    @property
    def rows(self) -> np.ndarray:
        """Rows of the duplicates, in the order of the manifest."""
        return np.flatnonzero(self.kept != np.arange(len(self.kept)))


def find_duplicates(
    root: str | os.PathLike[str],
    *,
    bits: int = BITS,
    channels: int = 3,
    workers: int | None = None,
    progress: bool = True,
    companions: bool = False,
) -> tuple[Manifest, Duplicates]:
    """Looks at every readable image of a folder (or of shards).

    Of images that are alike the one with the most pixels is kept, of these the first by path.

    Args:
        root: the data folder.
        bits: of 64 in which the hashes of duplicates differ at most.
        channels: model.in_chans of the training that it is for, whose index is used.
        workers: threads; None: one a core.
        progress: show bars, if there is a terminal.
        companions: look at companions of images, and what lies in hidden and trash folders, too.

    Raises:
        UserError: `bits` out of range, or no readable image.
    """
    if not 0 <= bits <= MAX_BITS:
        raise UserError(f"--threshold {bits}: must be 0 to {MAX_BITS} of the 64 bits of a hash")
    manifest = build_index(root, workers=workers, progress=progress, channels=channels, companions=companions)
    files = manifest.readable
    hashes, means, ok = _fingerprints(manifest, workers or default_workers(), progress)
    rows = np.flatnonzero(ok)
    size = files.height[rows] * files.width[rows]
    rows = rows[np.lexsort((rows, -size))]  # the best first
    kept, differ = np.arange(len(files)), np.zeros(len(files), np.int64)
    with progress_bar("comparing, per mille", 1000, wanted=progress) as bar:
        alike = _Alike(hashes[rows], means[rows], bits, lambda part: bar(part * 1000))
    for place, best in alike.duplicates():
        kept[rows[place]], differ[rows[place]] = rows[best], alike.bits(place, best)
    return manifest, Duplicates(files, kept, differ, len(files) - len(rows))


class _Alike:
    """Duplicates among fingerprints that come in the order in which they are to be kept."""

    def __init__(self, hashes: np.ndarray, means: np.ndarray, bits: int, report) -> None:
        self._hashes = hashes
        # Equal ones first: a thousand black tiles are one comparison each, not a million pairs.
        both = np.concatenate([hashes[:, None].view(np.uint8), means], axis=1)
        _, first, self._equal = np.unique(both, axis=0, return_index=True, return_inverse=True)
        order = np.argsort(first)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        self._first, self._equal = first[order], rank[self._equal.reshape(-1)]
        self._pairs = similar_pairs(hashes[self._first], means[self._first], bits, LEVELS, report)

    def duplicates(self) -> Iterator[tuple[int, int]]:
        """(place, place of the one that is kept instead)."""
        best = np.arange(len(self._first))
        for first, second in zip(*(side.tolist() for side in self._pairs), strict=True):  # sorted: the best first
            if best[first] == first and best[second] == second:
                best[second] = first
        of = self._first[best[self._equal]]
        for place in np.flatnonzero(of != np.arange(len(of))).tolist():
            yield place, int(of[place])

    def bits(self, a: int, b: int) -> int:
        """By which two hashes differ."""
        return int(distances(self._hashes[a], self._hashes[b]))


def _fingerprints(manifest: Manifest, workers: int, progress: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uint64 [N] hashes, uint8 [N, 48] means, and bool [N] whether the file could be read."""
    count = len(manifest.readable)
    hashes, means = np.zeros(count, np.uint64), np.zeros((count, GRID * GRID * 3), np.uint8)
    ok = np.zeros(count, np.bool_)
    storage = Storage(manifest.root)
    decode.allow_pixels(manifest.settings.max_pixels)

    def look(start: int) -> None:
        for row in range(start, min(start + _FILES, count)):
            try:
                hashes[row], means[row] = fingerprint(_read(manifest, row, storage))
                ok[row] = True
            except (MachineError, ClosedError):
                raise
            except Exception as error:  # hostile bytes: any library may raise anything
                told = os_reason(error) if isinstance(error, OSError) else " ".join(str(error).split())[:160]
                path = manifest.readable.paths[row].as_py()
                _log.warning("left alone %s: %s", path, told or type(error).__name__)

    starts = range(0, count, _FILES)
    with progress_bar("hashing", count, wanted=progress) as bar:
        for start, _ in zip(
            starts, map_ahead(look, starts, workers, _AHEAD, "pera-dedupe", storage.close), strict=True
        ):
            bar(min(_FILES, count - start))
    return hashes, means, ok


def _read(manifest: Manifest, row: int, storage: Storage) -> np.ndarray:
    files = manifest.readable
    path = locate(os.fspath(manifest.root), files.paths[row].as_py(), int(files.offset[row]), int(files.size[row]))
    data, state = storage(lambda: read_file(path), *place_of(path))
    if (state.st_size, state.st_mtime_ns) != (files.size[row], files.mtime_ns[row]):
        raise OSError("was changed since the index was made")  # unchecked bytes could kill the decoder
    return read_small(data, files.decoder[row].as_py())


def write_report(duplicates: Duplicates, path: Path) -> int:
    """One row for each file of each group, the one that is kept first. Returns the number of groups."""
    files, rows = duplicates.files, duplicates.rows
    groups = np.unique(duplicates.kept[rows])
    order = rows[np.lexsort((rows, duplicates.kept[rows]))]
    ends = np.searchsorted(duplicates.kept[order], groups, side="right")
    try:
        with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(_COLUMNS)
            start = 0
            for number, (kept, end) in enumerate(zip(groups, ends, strict=True), start=1):
                for row, action in [(kept, "keep"), *((row, "duplicate") for row in order[start:end])]:
                    shape = files.width[row], files.height[row], files.size[row]
                    writer.writerow((number, action, files.paths[row].as_py(), *shape, duplicates.bits[row]))
                start = end
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror or error}); give another file") from error
    return len(groups)


def move(manifest: Manifest, duplicates: Duplicates, to: Path) -> tuple[int, int]:
    """Moves the duplicates below another folder, under the same relative paths; nothing is overwritten or deleted.

    Returns:
        (moved, left where they are because they are gone, were changed, or their name is taken).

    Raises:
        UserError: the images are in shards, or the folder lies in the data folder or cannot be written.
    """
    files, root = duplicates.files, manifest.root
    refuse_inside("--move", to, root)
    if len(duplicates.rows) and files.offset[duplicates.rows].max() >= 0:
        raise UserError(f"--move {to}: {root} holds shards, from which nothing can be moved; use the report")
    moved = left = 0
    for row in duplicates.rows.tolist():
        path = files.paths[row].as_py()
        source, target = root / path, to / path
        try:
            state = os.lstat(source)
            if (state.st_size, state.st_mtime_ns) != (files.size[row], files.mtime_ns[row]) or os.path.lexists(target):
                why = "its name is taken there" if os.path.lexists(target) else "it is not the file that was looked at"
                _log.warning("not moved %s: %s", source, why)
                left += 1
                continue
        except OSError as error:
            _log.warning("not moved %s: %s", source, error.strerror or error)
            left += 1
            continue
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(source, target)
        except OSError as error:
            told = f"--move {to}: cannot write there ({error.strerror or error}); {moved} file(s) were moved"
            raise UserError(told) from error
        moved += 1
    return moved, left


def _is_report(path: Path) -> bool:
    """Whether a file is a report of an earlier call, which a new one may replace."""
    try:
        with open(path, newline="", encoding="utf-8", errors="backslashreplace") as file:
            return next(csv.reader(file), None) == list(_COLUMNS)
    except OSError:
        return False


def dedupe(
    root: str | os.PathLike[str],
    *,
    bits: int = BITS,
    out: str | os.PathLike[str] = "duplicates.csv",
    move_to: str | os.PathLike[str] | None = None,
    channels: int = 3,
    workers: int | None = None,
    progress: bool = True,
    overwrite: bool = False,
    companions: bool = False,
) -> str:
    """Finds, reports and, if `move_to` is given, moves near-duplicates. Returns one line that sums up."""
    report = new_file("--out", out, overwrite or _is_report(Path(out)))
    if move_to is not None:
        refuse_inside("--move", move_to, root)
    if report.is_dir() or not report.absolute().parent.is_dir():
        raise UserError(f"--out {report}: give the name of a CSV file in a folder that exists")
    manifest, duplicates = find_duplicates(
        root, bits=bits, channels=channels, workers=workers, progress=progress, companions=companions
    )
    groups = write_report(duplicates, report)
    told = (
        f"{len(duplicates.rows)} of {len(duplicates.files)} images are near-duplicates of {groups} others,"
        f" {duplicates.files.size[duplicates.rows].sum() / 2**20:.1f} MiB ({report})"
    )
    if duplicates.failed:
        told += f"; {duplicates.failed} could not be read"
    if move_to is None:
        return f"{told}; nothing was changed"
    moved, left = move(manifest, duplicates, Path(move_to))
    return f"{told}; {moved} moved to {move_to}" + (f", {left} left" if left else "")
