"""Checks files in worker processes, a bounded number at a time, and yields results in the order of the files."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pyarrow as pa

from pera_fast.data.decoding.probe import MAX_FILES, ProbeResult, ProbeSettings, answered, os_reason
from pera_fast.data.decoding.sandbox import Sandbox
from pera_fast.data.decoding.tar import Member
from pera_fast.data.files.manifest import to_table
from pera_fast.data.files.shards import locate, place_of
from pera_fast.storage import AloneError, Storage

_BATCH_BYTES = 2**26  # read together by one worker
_AHEAD = 8  # batches under way for each worker: those that wait for a slow one before them

Batch = list[dict[str, Any]]  # rows of scan.LISTED


class Checks:
    """Sandboxes with threads that feed them. A context manager; leaving it ends what is under way.

    Args:
        folder: that the paths are relative to.
        settings: how the files will be used.
        workers: processes.
        timeout: seconds after which a decoder is taken to hang.
        storage: waits where the storage is away.
    """

    def __init__(self, folder: Path, settings: ProbeSettings, workers: int, timeout: float, storage: Storage):
        self._storage = storage
        self._folder, self._settings, self._workers = os.fspath(folder), settings, workers
        self._sandboxes = [Sandbox(timeout) for _ in range(workers)]
        self._idle: SimpleQueue[Sandbox] = SimpleQueue()
        for sandbox in reversed(self._sandboxes):
            self._idle.put(sandbox)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="pera-index")

    def __enter__(self) -> "Checks":
        return self

    def __exit__(self, *_: object) -> None:
        self._storage.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for sandbox in self._sandboxes:
            sandbox.close()
        self._pool.shutdown()

    def run(self, tasks: Iterable[Batch | pa.Table]) -> Iterator[tuple[bool, pa.Table]]:
        """Each batch's rows (manifest.SCHEMA) as (True, rows); a table passes as (False, table), in its turn."""
        under_way: deque[Future[pa.Table] | pa.Table] = deque()
        for task in tasks:
            under_way.append(self._pool.submit(self._check, task) if isinstance(task, list) else task)
            while under_way and (_done(under_way[0]) or len(under_way) > _AHEAD * self._workers):
                yield _result(under_way.popleft())
        while under_way:
            yield _result(under_way.popleft())

    def _check(self, batch: Batch) -> pa.Table:
        wanted = [row for row in batch if not row["reason"]]
        found: Iterator[ProbeResult] = iter(())
        if wanted:
            paths = [locate(self._folder, row["path"], row["offset"], row["size"]) for row in wanted]
            found = map(self._settled, self._probe(paths), paths)
        results = []
        for row in batch:
            result = ProbeResult(row["path"], reason=row["reason"]) if row["reason"] else next(found)
            result.path, result.offset = row["path"], row["offset"]
            results.append(result)
        return to_table(results)

    def _probe(self, paths: Sequence[str | Member]) -> list[ProbeResult]:
        sandbox = self._idle.get()
        try:
            return sandbox.probe(paths, self._settings)
        finally:
            self._idle.put(sandbox)

    def _settled(self, result: ProbeResult, path: str | Member) -> ProbeResult:
        """The result, or that of another try where the storage or the machine kept the file from being read."""
        first = [result]

        def once() -> ProbeResult:
            return answered(first.pop() if first else self._probe([path])[0])

        try:
            return self._storage(once, *place_of(path))
        except AloneError as error:  # of size -1, so that the next index tries it again
            return ProbeResult(str(path), reason=os_reason(error))


def batches(listed: pa.Table) -> Iterator[Batch]:
    """Rows of scan.LISTED, cut into what one call to a worker takes."""
    batch: Batch = []
    volume = 0
    for piece in listed.to_batches(max_chunksize=2**12):
        for row in piece.to_pylist():
            if batch and (len(batch) == MAX_FILES or volume + row["size"] > _BATCH_BYTES):
                yield batch
                batch, volume = [], 0
            batch.append(row)
            volume += max(row["size"], 0)
    if batch:
        yield batch


def _done(task: "Future[pa.Table] | pa.Table") -> bool:
    return not isinstance(task, Future) or task.done()


def _result(task: "Future[pa.Table] | pa.Table") -> tuple[bool, pa.Table]:
    return (True, task.result()) if isinstance(task, Future) else (False, task)
