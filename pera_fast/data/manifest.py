"""The manifest: one row per file of a data folder, kept as Parquet."""

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pera_fast.data.probe import ProbeResult, ProbeSettings
from pera_fast.errors import UserError

_METADATA = b"pera_fast"
_VERSION = 2
_NUMBERS = ("height", "width", "size", "mtime_ns", "offset")

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
    ]
)


@dataclass(frozen=True)
class ReadableFiles:
    """The rows of a manifest that are ok, in its order; a sample is a row of these arrays."""

    paths: pa.Array  # string; relative to the root
    height: np.ndarray  # int64
    width: np.ndarray  # int64
    size: np.ndarray  # int64, bytes
    mtime_ns: np.ndarray  # int64
    decoder: pa.Array  # string
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

    @classmethod
    def from_results(
        cls, root: Path, results: list[ProbeResult], settings: ProbeSettings, dali: str = ""
    ) -> "Manifest":
        """From results whose paths are relative to `root`."""
        rows = sorted(results, key=attrgetter("path"))
        columns = {name: list(map(attrgetter(name), rows)) for name in SCHEMA.names}
        return cls(root, pa.table(columns, schema=SCHEMA), settings, dali)

    def results(self) -> list[ProbeResult]:
        """All rows."""
        columns = (self.table[item.name].to_pylist() for item in fields(ProbeResult))
        return list(map(ProbeResult, *columns))

    @cached_property
    def readable(self) -> ReadableFiles:
        """The rows that are ok."""
        table = self.table.filter(self.table["ok"]).combine_chunks()
        numbers = {name: table[name].to_numpy().astype(np.int64) for name in _NUMBERS}
        paths, decoder = (_array(table[name]) for name in ("path", "decoder"))
        return ReadableFiles(paths=paths, decoder=decoder, **numbers)

    def unreadable(self) -> list[tuple[str, str]]:
        """(path, reason) of the rows that are not ok."""
        table = self.table.filter(pc.field("ok") == pa.scalar(False))
        return list(zip(table["path"].to_pylist(), table["reason"].to_pylist(), strict=True))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the Parquet file as a whole or not at all. Raises UserError if it cannot be written."""
        target = Path(path)
        about = {"version": _VERSION, "root": os.fspath(self.root), "dali": self.dali, **asdict(self.settings)}
        table = self.table.replace_schema_metadata({_METADATA: json.dumps(about).encode()})
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
            os.close(handle)
            try:
                pq.write_table(table, part, compression="zstd")
                os.replace(part, target)
            except BaseException:
                os.unlink(part)
                raise
        except OSError as error:
            raise UserError(not_writable(target, error)) from error
        self.path = target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Manifest":
        """Reads a manifest. Raises UserError if there is none at `path` or it is of another kind."""
        source = Path(path)
        try:
            table = pq.read_table(source)
        except (OSError, pa.ArrowException) as error:
            why = "no such file" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
            raise UserError(f"cannot read the index {source}: {why}") from error
        try:
            about: dict[str, Any] = json.loads((table.schema.metadata or {})[_METADATA])
            if about["version"] != _VERSION:
                raise ValueError(f"version {about['version']}")
            settings = ProbeSettings(**{item.name: about[item.name] for item in fields(ProbeSettings)})
            table = table.select(SCHEMA.names).cast(SCHEMA)
            return cls(Path(about["root"]), table, settings, about["dali"], source)
        except (KeyError, ValueError, TypeError, pa.ArrowException) as error:
            raise UserError(f"{source} is no index of this version of pera-fast ({error})") from error


def not_writable(target: Path, error: OSError) -> str:
    """What to tell about a manifest that cannot be written."""
    return f"cannot write the index {target}: {error.strerror or error} (data.index=PATH puts it elsewhere)"


def _array(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
