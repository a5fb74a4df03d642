"""Finds the files of a folder with several threads, because a network disk makes each call wait.

What is found is handed on in record batches, so that the number of files does not show in the memory.
"""

import os
import queue
import stat
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pyarrow as pa

from pera_fast.data.decoding.formats import HEAD_BYTES, has_image_suffix, sniff
from pera_fast.data.files.companions import FOLDERS, companion, hides
from pera_fast.storage import Storage

LISTED = pa.schema(
    [
        ("path", pa.string()),  # relative to the scanned folder
        ("size", pa.int64()),  # bytes; -1: not known
        ("mtime_ns", pa.int64()),
        ("reason", pa.string()),  # why it cannot be read, if that shows already
        ("offset", pa.int64()),  # of the content in its shard, bytes; -1: a file of its own
    ]
)
_THREADS = 8
BATCH_ROWS = 8192


@dataclass
class Listing:
    """Contents of a folder other than candidates."""

    files: int = 0  # candidates handed on
    other_files: int = 0  # neither named like an image nor begins like one: labels, notes, archives
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # (folder, reason)
    left_out: Counter[str] = field(default_factory=Counter)  # companions of images, by kind


class Rows:
    """Candidates on their way into a record batch."""

    def __init__(self) -> None:
        self._columns: tuple[list, ...]
        self.clear()

    def __len__(self) -> int:
        return len(self._columns[0])

    def add(self, path: str, size: int = -1, mtime_ns: int = 0, reason: str = "", offset: int = -1) -> None:
        for column, value in zip(self._columns, (path, size, mtime_ns, reason, offset), strict=True):
            column.append(value)

    def batch(self) -> pa.RecordBatch:
        """Files that were added since the last batch."""
        batch = pa.record_batch(list(self._columns), schema=LISTED)
        self.clear()
        return batch

    def clear(self) -> None:
        """Forget the files that were added since the last batch."""
        self._columns = ([], [], [], [], [])


def scan(
    root: str,
    emit: Callable[[pa.RecordBatch], None],
    report: Callable[[int], None] = lambda found: None,
    storage: Storage | None = None,
    companions: bool = False,
) -> Listing:
    """Hands on all candidates under `root`, in no order. Unreadable folders are passed over.

    Where the storage fails within a folder, that folder is listed again: some of its files are then handed on twice.

    A candidate has an image's suffix, or begins like an image whatever its name. Links to folders are followed after
    the real folders, in the order of their paths, and only to where nothing was listed yet: so loops end, each file is
    found once, and always under the same path.

    Args:
        root: the folder.
        emit: takes record batches (LISTED); called by one thread at a time.
        report: told now and then how many candidates there are so far.
        storage: waits where the storage is away; None: one of its own.
        companions: hand on companions of images, and what lies in hidden and trash folders, too.

    Raises:
        MachineError: the storage did not answer in time.
    """
    storage = storage or Storage(root)
    walk = _Walk(root, emit, report, storage, companions)
    pending, seen = [""], _Trees()
    while pending:
        folders = [(folder, real) for folder in sorted(pending) if seen.add(real := _real(root, folder, storage))]
        pending = walk.run(folders, seen)
    walk.listing.unreadable.sort()
    return walk.listing


def _real(root: str, folder: str, storage: Storage) -> str:
    path = os.path.join(root, folder)
    try:
        return storage(lambda: os.path.realpath(path, strict=True), path)  # not strict, it takes a fault for no link
    except OSError:
        return os.path.realpath(path)


class _Trees:
    """Real folders whose trees are listed, or will be."""

    def __init__(self) -> None:
        self.tops: set[str] = set()

    def add(self, real: str) -> bool:
        """Whether a tree is new; it is taken for listed from now on."""
        above = real
        while True:
            if above in self.tops:
                return False
            parent = os.path.dirname(above)
            if parent == above:
                break
            above = parent
        self.tops.add(real)
        return True


class _Walk:
    """Threads that list trees of folders."""

    def __init__(
        self,
        root: str,
        emit: Callable[[pa.RecordBatch], None],
        report: Callable[[int], None],
        storage: Storage,
        companions: bool,
    ):
        self.listing = Listing()
        self._storage, self._companions = storage, companions
        self._root, self._emit, self._report = root, emit, report
        self._lock = threading.Lock()
        self._errors: list[BaseException] = []
        self._links: list[str] = []
        self._folders: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
        self._waiting = 0  # folders that are queued or at work

    def run(self, folders: list[tuple[str, str]], trees: _Trees) -> list[str]:
        """Lists the trees below some (folder, its real path), except for other trees; returns the links to folders."""
        self._links, self._waiting = [], len(folders)
        for folder in folders:
            self._folders.put(folder)
        tops = frozenset(trees.tops)
        threads = [
            threading.Thread(target=self._work, args=(tops,), name="pera-scan", daemon=True)
            for _ in range(_THREADS if folders else 0)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        return self._links

    def _work(self, tops: frozenset[str]) -> None:
        rows = Rows()
        while (item := self._folders.get()) is not None:
            try:
                if not self._errors:
                    self._list(*item, rows, tops)
            except OSError as error:
                with self._lock:
                    self.listing.unreadable.append((item[0], error.strerror or str(error)))
            except BaseException as error:  # must reach the caller
                self._errors.append(error)
            with self._lock:
                self._waiting -= 1
                if self._waiting == 0:
                    for _ in range(_THREADS):
                        self._folders.put(None)

    def _list(self, folder: str, real: str, rows: Rows, tops: frozenset[str]) -> None:
        entered: set[str] = set()  # folders and links, which a second look does not enter again
        handed_on = 0

        def look() -> tuple[int, Counter[str]]:
            nonlocal handed_on
            with self._lock:
                self.listing.files -= handed_on  # by a look that the storage cut short
            rows.clear()
            others = handed_on = 0
            left_out: Counter[str] = Counter()
            with os.scandir(os.path.join(self._root, folder)) as items:
                for item in items:
                    path = os.path.join(folder, item.name)
                    if is_dir(item, self._storage):
                        if not self._companions and hides(item.name):
                            left_out[FOLDERS] += 1
                        elif path not in entered:
                            self._enter(path, os.path.join(real, item.name), item.is_symlink(), tops)
                        entered.add(path)
                    elif not self._companions and (kind := companion(item.name)):
                        left_out[kind] += 1
                    elif not _add_candidate(rows, item, path, self._storage):
                        others += 1
                    if len(rows) >= BATCH_ROWS:
                        handed_on += self._flush(rows)
            handed_on += self._flush(rows)
            return others, left_out

        others, left_out = self._storage(look, os.path.join(self._root, folder))
        with self._lock:
            self.listing.other_files += others
            self.listing.left_out += left_out

    def _enter(self, path: str, real: str, link: bool, tops: frozenset[str]) -> None:
        if not link and real in tops:
            return
        with self._lock:
            if link:
                self._links.append(path)
            else:
                self._waiting += 1
        if not link:
            self._folders.put((path, real))

    def _flush(self, rows: Rows) -> int:
        """Hand on the rows; returns how many."""
        if not len(rows):
            return 0
        batch = rows.batch()
        with self._lock:
            self.listing.files += batch.num_rows
            self._report(self.listing.files)
            try:
                self._emit(batch)
            except BaseException as error:  # not the folder's fault, whatever it is
                self._errors.append(error)
        return batch.num_rows


def is_dir(item: os.DirEntry[str], storage: Storage) -> bool:
    """Whether an entry is a folder, or a link to one."""
    try:
        return storage(item.is_dir, item.path)
    except OSError:  # a link that leads to itself
        return False


def _add_candidate(rows: Rows, item: os.DirEntry[str], path: str, storage: Storage) -> bool:
    """Whether the file is meant to be an image; if so it is added."""
    named = has_image_suffix(item.name)
    try:
        path.encode()
    except UnicodeEncodeError:
        if named:
            shown = os.fsencode(path).decode("utf-8", "backslashreplace")
            rows.add(shown, reason="file name is not UTF-8: rename it")
        return named
    try:
        state = storage(item.stat, item.path, 0)
    except OSError as error:
        if named:
            rows.add(path, reason=f"cannot read: {error.strerror or error}")
        return named
    if not stat.S_ISREG(state.st_mode):
        if named:
            rows.add(path, reason="cannot read: not a regular file")
        return named
    if not named and not _begins_like_image(item.path, storage):
        return False
    rows.add(path, state.st_size, state.st_mtime_ns)
    return True


def _begins_like_image(path: str, storage: Storage) -> bool:
    def head() -> bytes:
        with open(path, "rb", buffering=0) as file:
            return os.read(file.fileno(), HEAD_BYTES)

    try:
        return sniff(storage(head, path, 0)) is not None
    except OSError:
        return False
