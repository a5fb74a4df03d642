"""The manifest: one row for each file of a data folder, as Parquet, written and read in pieces where it is large."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from pera_fast.data.decoding.probe import ProbeResult, ProbeSettings
from pera_fast.data.files.sealed import check_seal, seal
from pera_fast.durable import partial_path
from pera_fast.errors import UserError

pc: Any = pyarrow.compute  # made when it is imported: type checkers see none of its functions
_METADATA = b"pera_fast"
_VERSION = 4
_SEALED = {"sealed": True}  # earlier files of this version say nothing and have no digest

SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # relative to the root; of a shard's member SHARD.tar/MEMBER
        ("format", pa.string()),
        ("width", pa.int32()),  # upright
        ("height", pa.int32()),
        ("channels", pa.int32()),  # as stored
        ("dtype", pa.string()),
        ("ok", pa.bool_()),
        ("reason", pa.string()),  # why not
        ("decoder", pa.string()),  # dali, pillow or rasterio; empty: not tried
        ("size", pa.int64()),  # bytes
        ("mtime_ns", pa.int64()),  # of a member: its shard's
        ("offset", pa.int64()),  # of a shard's member: bytes from the shard's start; -1: a file of its own
        ("scale", pa.string()),  # declared scale of the values; empty: none, or 8 bits
    ]
)
_ROW_GROUP = 2**16
_NUMBERS = ("height", "width", "size", "mtime_ns", "offset")


@dataclass(frozen=True)
class ReadableFiles:
    """The rows of a manifest that are ok, in its order; a sample is a row of these arrays."""

    paths: pa.ChunkedArray  # string; relative to the root
    height: np.ndarray  # int64
    width: np.ndarray  # int64
    size: np.ndarray  # int64, bytes
    mtime_ns: np.ndarray  # int64
    decoder: pa.ChunkedArray  # string
    offset: np.ndarray  # int64; -1: a file of its own

    def __len__(self) -> int:
        return len(self.paths)


@dataclass
class Manifest:
    """Files of a folder and whether they can be decoded; rows sorted by path."""

    root: Path  # absolute
    table: pa.Table  # SCHEMA
    settings: ProbeSettings
    dali: str = ""  # version that checked
    path: Path | None = field(default=None, compare=False)  # where it is kept
    summary: str = field(default="", compare=False)  # one line: what making it took
    decided: dict[str, Any] = field(default_factory=dict, compare=False)  # depth and band_range of a run, see `sensor`

    @cached_property
    def readable(self) -> ReadableFiles:
        """The rows that are ok. Where all are, the columns are the table's own and take no memory."""
        table = self.table.select(["path", "decoder", *_NUMBERS])
        if not pc.all(self.table["ok"]).as_py():
            table = table.filter(self.table["ok"])
        numbers = {name: table[name].to_numpy().astype(np.int64, copy=False) for name in _NUMBERS}
        return ReadableFiles(paths=table["path"], decoder=table["decoder"], **numbers)

    def unreadable(self) -> list[tuple[str, str]]:
        """(path, reason) of the rows that are not ok."""
        table = self.table.filter(pc.field("ok") == pa.scalar(False))
        return list(zip(table["path"].to_pylist(), table["reason"].to_pylist(), strict=True))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the Parquet file as a whole or not at all. Raises UserError if it cannot be written."""
        with ManifestWriter(path, self.root, self.settings, self.dali, self.decided) as writer:
            writer.write(self.table)
            writer.commit()
        self.path = writer.target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Manifest":
        """Reads a manifest. Raises UserError if there is none at `path` or it is of another kind."""
        source = Path(path)
        with StoredManifest(source) as stored:
            table = stored.read()
        return cls(stored.root, table, stored.settings, stored.dali, source, decided=stored.decided)


class StoredManifest:
    """A manifest on disk, of which only the description is read at once. A context manager.

    Raises:
        UserError: there is none at `path`, or it is of another kind; also from reading, if it is damaged.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            sealed = check_seal(path)
            self._file = pq.ParquetFile(path)
            schema = self._file.schema_arrow
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self._unreadable(error) from error
        try:
            about: dict[str, Any] = json.loads((schema.metadata or {})[_METADATA])
            if about["version"] != _VERSION:
                raise ValueError(f"version {about['version']}")
            if about.get("sealed") and not sealed:  # versions before did not seal
                raise ValueError("its digest is missing")
            self.settings = ProbeSettings(**{item.name: about[item.name] for item in fields(ProbeSettings)})
            self.root, self.dali = Path(about["root"]), str(about["dali"])
            self.decided: dict[str, Any] = about["decided"]
            if missing := set(SCHEMA.names) - set(schema.names):
                raise ValueError(f"no column {', '.join(sorted(missing))}")
        except (KeyError, ValueError, TypeError) as error:
            self._file.close()
            raise UserError(f"{path} is no index of this version of pera-fast ({error})") from error

    def __enter__(self) -> "StoredManifest":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self) -> pa.Table:
        """All rows."""
        try:
            return self._file.read(columns=SCHEMA.names).cast(SCHEMA)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self._unreadable(error) from error

    def stream(self, rows: int = 2**14) -> Iterator[pa.Table]:
        """The rows in their order, some at a time."""
        try:
            for batch in self._file.iter_batches(rows, columns=SCHEMA.names, use_threads=False):
                yield pa.Table.from_batches([batch]).cast(SCHEMA)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> UserError:
        why = "no such file" if isinstance(error, FileNotFoundError) else (str(error).splitlines() or [repr(error)])[0]
        return UserError(f"cannot read the index {self._path}: {why}")


class ManifestWriter:
    """Writes a manifest piece by piece; until `commit` nothing is at its place. A context manager.

    Args:
        path: the Parquet file.
        root, settings, dali, decided: what the manifest says about itself.

    Raises:
        UserError: it cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        root: Path,
        settings: ProbeSettings,
        dali: str,
        decided: dict[str, Any] | None = None,
    ):
        self.target = Path(path)
        about = {"version": _VERSION, "root": os.fspath(root), "dali": dali, "decided": decided or {}}
        about |= asdict(settings) | _SEALED
        schema = SCHEMA.with_metadata({_METADATA: json.dumps(about).encode()})
        self._held: list[pa.Table] = []
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._part = partial_path(self.target)
            self._writer = pq.ParquetWriter(self._part, schema, compression="zstd")
        except OSError as error:
            raise UserError(not_writable(self.target, error)) from error

    def __enter__(self) -> "ManifestWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._part.exists():  # not committed
            with contextlib.suppress(OSError):  # it is thrown away
                self._writer.close()
            self._part.unlink(missing_ok=True)

    def write(self, table: pa.Table) -> None:
        """Adds rows (SCHEMA), which follow in the order of their paths."""
        self._held.append(table)
        if sum(piece.num_rows for piece in self._held) >= _ROW_GROUP:
            self._flush()

    def commit(self) -> None:
        """Puts the manifest at its place."""
        self._flush()
        try:
            self._writer.close()
            seal(self._part)
            os.replace(self._part, self.target)
        except OSError as error:
            raise UserError(not_writable(self.target, error)) from error

    def _flush(self) -> None:
        if not self._held:
            return
        table, self._held = pa.concat_tables(self._held), []
        try:
            self._writer.write_table(table, row_group_size=_ROW_GROUP)
        except OSError as error:
            raise UserError(not_writable(self.target, error)) from error


def to_table(results: Iterable[ProbeResult]) -> pa.Table:
    """Results as rows (SCHEMA), in their order."""
    rows = list(results)
    return pa.table({name: list(map(attrgetter(name), rows)) for name in SCHEMA.names}, schema=SCHEMA)


def not_writable(target: Path, error: OSError) -> str:
    """Message for a manifest that cannot be written."""
    return f"cannot write the index {target}: {error.strerror or error} (data.index=PATH puts it elsewhere)"
