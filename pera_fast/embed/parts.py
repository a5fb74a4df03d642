"""Keeps what is embedded so far in a folder beside the output, so that a stopped command goes on.

The folder holds the index of the images (its list is that of the first call), what was asked for, and parts of the
table. A part is named by the row of the index after its last one, and written whole or not at all.
"""

import csv
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pera_fast.data.files.manifest import Manifest
from pera_fast.durable import lock, read_object, whole_file
from pera_fast.embed.table import About, patches_of, schema, vectors_of
from pera_fast.errors import UserError, one_line

_ROW_GROUP = 2**16  # rows at most of a group in the output
_GROUP_BYTES = 2**25  # of features, at most, unless one row has more
_NAMES = {"digest": "other weights", "root": "other images"}  # what a difference means


def parts_folder(target: Path) -> Path:
    """The folder beside an output that holds its parts."""
    return target.with_name(f"{target.name}.parts")


class Parts:
    """Parts of one output. A context manager: inside, no other process works there.

    Args:
        target: the output.

    Raises:
        UserError: another process works there, or the folder cannot be written.
    """

    def __init__(self, target: Path):
        self.target, self.folder = target, parts_folder(target)
        self._about, self._index = self.folder / "about.json", self.folder / "index.parquet"
        self._stack = ExitStack()

    def __enter__(self) -> "Parts":
        try:
            self.folder.mkdir(exist_ok=True)
            file = self._stack.enter_context(open(self.folder / "lock", "w"))
            lock(file)
        except BlockingIOError:
            raise UserError(f"--out {self.target}: another process is writing it; wait for it or stop it") from None
        except OSError as error:
            raise UserError(self.not_written(error)) from error
        return self

    def __exit__(self, *_: object) -> None:
        if not self._about.exists():  # nothing was begun
            shutil.rmtree(self.folder, ignore_errors=True)
        self._stack.close()

    @property
    def begun(self) -> bool:
        """Whether an earlier call has begun this output."""
        return self._about.exists()

    def begin(self, about: About, manifest: Manifest) -> None:
        """Forgets earlier parts, and writes down what is asked for."""
        try:
            self._about.unlink(missing_ok=True)
            for path in self._paths():
                path.unlink()
            manifest.save(self._index)
            with whole_file(self._about, sync=True) as partial:
                partial.write_text(json.dumps(asdict(about)), encoding="utf-8")
        except OSError as error:
            raise UserError(self.not_written(error)) from error

    def go_on(self, about: About) -> Manifest:
        """The index of the first call. Raises UserError where that asked for something else."""
        try:
            before = read_object(self._about)
        except (OSError, ValueError) as error:
            raise UserError(f"{self._about}: damaged ({one_line(error, 120)}); begin anew with --overwrite") from None
        for name, value in asdict(about).items():
            if before.get(name) != value:
                told = _NAMES.get(name) or f"{name.replace('_', ' ')} {one_line(before.get(name), 60)}"
                raise UserError(
                    f"--out {self.target}: was begun with {told}; give the same, or --overwrite to begin anew"
                )
        manifest = Manifest.load(self._index)
        manifest.root = Path(about.root)
        return manifest

    @property
    def done(self) -> int:
        """Rows of the index that are embedded, or left out."""
        return max((int(path.stem) for path in self._paths()), default=0)

    def add(self, stop: int, rows: pa.Table) -> None:
        """Keeps rows, which follow those of the part before and end before row `stop` of the index."""
        try:
            with whole_file(self.folder / f"{stop:012d}.parquet", sync=True) as partial:
                pq.write_table(rows, partial, compression="none", use_dictionary=False)
        except OSError as error:
            raise UserError(self.not_written(error)) from error

    def finish(self, about: About) -> int:
        """Writes the output of all parts, removes them, and returns the number of rows."""
        try:
            written = _write_npy if self.target.suffix == ".npy" else _write_parquet
            count = written(self.target, about, self)
            self._about.unlink()
            shutil.rmtree(self.folder, ignore_errors=True)
        except (OSError, pa.ArrowException) as error:
            raise UserError(self.not_written(error)) from error
        return count

    def tables(self) -> Iterator[pa.Table]:
        """The parts in order."""
        for path in self._paths():
            yield pq.read_table(path)

    def count(self) -> int:
        """Rows of all parts."""
        return sum(pq.read_metadata(path).num_rows for path in self._paths())

    def not_written(self, error: Exception) -> str:
        """Message for an output that cannot be written."""
        told = (isinstance(error, OSError) and error.strerror) or one_line(error, 120)
        return f"--out {self.target}: cannot be written ({told})"

    def _paths(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*.parquet") if path.stem.isdigit())


def _write_parquet(target: Path, about: About, parts: Parts) -> int:
    size = max(1, min(_ROW_GROUP, _GROUP_BYTES // about.row_bytes))
    held: list[pa.Table] = []
    waiting = count = 0
    # Features hardly shrink, and without a dictionary they are read ten times as fast.
    options: Any = {"compression": {"path": "zstd", "crs": "zstd"}, "use_dictionary": ["crs"]}
    with (
        whole_file(target, sync=True) as partial,
        pq.ParquetWriter(partial, schema(about), **options) as writer,
    ):
        for table in parts.tables():
            held.append(table)
            waiting, count = waiting + table.num_rows, count + table.num_rows
            while waiting >= size:
                joined = pa.concat_tables(held)
                writer.write_table(joined.slice(0, size), row_group_size=size)
                held, waiting = [joined.slice(size)], waiting - size
        if waiting:
            writer.write_table(pa.concat_tables(held), row_group_size=size)
    return count


def _write_npy(target: Path, about: About, parts: Parts) -> int:
    """The vectors as an array, paths and places as a CSV file in the same order, patches as an array of their own."""
    count = parts.count()
    with ExitStack() as stack:

        def new(path: Path, shape: tuple[int, ...]) -> Any:
            partial = stack.enter_context(whole_file(path, sync=True))
            if 0 in shape:  # nothing can be mapped
                np.save(partial.open("wb"), np.empty(shape, np.float16))
                return np.empty(shape, np.float16)
            return np.lib.format.open_memmap(partial, "w+", np.float16, shape)

        vectors = new(target, (count, about.width))
        patches = None
        if about.patches:
            patches = new(target.with_name(f"{target.stem}.patches.npy"), (count, about.positions, about.patch_width))
        partial = stack.enter_context(whole_file(target.with_suffix(".csv"), sync=True))
        listed = stack.enter_context(open(partial, "w", newline="", encoding="utf-8", errors="backslashreplace"))
        writer = csv.writer(listed, lineterminator="\n")
        writer.writerow(("path", "lon", "lat", "crs", "left", "bottom", "right", "top"))
        start = 0
        for table in parts.tables():
            stop = start + table.num_rows
            vectors[start:stop] = vectors_of(table)
            if patches is not None:
                patches[start:stop] = patches_of(table)
            for row in table.select(["path", "lon", "lat", "crs", "bounds"]).to_pylist():
                writer.writerow((row["path"], row["lon"], row["lat"], row["crs"], *(row["bounds"] or [None] * 4)))
            start = stop
    return count
