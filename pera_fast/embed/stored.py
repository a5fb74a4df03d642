"""Reads a table of embeddings in pieces, as `embed` wrote it."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pera_fast.config import Config
from pera_fast.embed.table import METADATA, VERSION, About, vectors_of
from pera_fast.errors import UserError, one_line
from pera_fast.paths import local_path

_READ = 2**14  # rows at a time


class Embeddings:
    """A table of embeddings on disk.

    Args:
        path: the Parquet file.

    Raises:
        UserError: there is none, or it is another kind of file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = local_path("--embeddings", path)
        if self.path.suffix == ".npy":
            raise UserError(f"--embeddings {path}: holds no paths; give the .parquet file that embed writes")
        try:
            self._file = pq.ParquetFile(self.path)
            told = json.loads((self._file.schema_arrow.metadata or {})[METADATA])
            if told.get("version") != VERSION:
                raise ValueError(f"version {told.get('version')}")
            self.about = About(**{field.name: told[field.name] for field in fields(About)})
        except FileNotFoundError:
            raise UserError(f"--embeddings {path}: no such file") from None
        except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"--embeddings {path}: not embeddings of this version of pera-fast ({one_line(error, 80)}); pera-fast"
                " embed writes them"
            ) from None

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def cfg(self) -> Config:
        """A configuration by which the images are read as they were embedded."""
        about = self.about
        return Config().with_values({
            "model.in_chans": about.channels, "views.rgb_bands": about.rgb_bands, "data.bands": about.bands,
            "data.depth": about.depth, "data.band_scale": about.band_scale, "data.band_range": about.band_range,
        })  # fmt: skip

    def vectors(self) -> Iterator[np.ndarray]:
        """float16 [n, D] of all rows in their order, some at a time."""
        for batch in self._batches(["vector"]):
            yield vectors_of(batch)

    def column(self, name: str) -> Iterator[pa.ChunkedArray]:
        """A column in pieces."""
        for batch in self._batches([name]):
            yield batch[name]

    def find(self, wanted: Sequence[str], below: str | None = None) -> list[int]:
        """Rows of some paths, and of all paths below a folder, in the table's order."""
        known, start, found = set(wanted), 0, []
        for paths in self.column("path"):
            for row, path in enumerate(paths.to_pylist(), start):
                if path in known or (below is not None and path.startswith(below)):
                    found.append(row)
            start += len(paths)
        return found

    def take(self, rows: Sequence[int], columns: Sequence[str]) -> pa.Table:
        """Some columns of some rows, in the order of `rows`."""
        ends = np.cumsum([self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)])
        pieces, order = [], np.argsort(rows, kind="stable")
        for group in sorted({int(np.searchsorted(ends, row, side="right")) for row in rows}):
            start = int(ends[group - 1]) if group else 0
            inside = [rows[at] - start for at in order if start <= rows[at] < ends[group]]
            with self._damaged():
                pieces.append(self._file.read_row_group(group, columns=list(columns)).take(inside))
        joined = pa.concat_tables(pieces)
        return joined.take(np.argsort(order))

    def _batches(self, columns: list[str]) -> Iterator[pa.Table]:
        with self._damaged():
            for batch in self._file.iter_batches(_READ, columns=columns, use_threads=False):
                yield pa.Table.from_batches([batch])

    @contextlib.contextmanager
    def _damaged(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"--embeddings {self.path}: damaged ({one_line(error, 80)}); embed anew") from None
