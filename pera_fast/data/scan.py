"""Finds the files of a folder, in parallel: on a network disk the time goes into waiting."""

import os
import queue
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from pera_fast.data.formats import HEAD_BYTES, has_image_suffix, sniff

_THREADS = 8


@dataclass
class Entry:
    """A file that is meant to be an image."""

    path: str  # relative to the scanned folder
    size: int = -1  # bytes
    mtime_ns: int = 0
    reason: str = ""  # why it cannot be read, if that shows already
    offset: int = -1  # of the content in its shard, bytes; -1: a file of its own


@dataclass
class Listing:
    """What a folder holds."""

    entries: list[Entry] = field(default_factory=list)  # sorted by path
    other_files: int = 0  # neither named like an image nor begins like one: labels, notes, archives
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # (folder, reason)


def scan(root: str, report: Callable[[int], None] = lambda found: None) -> Listing:
    """All candidates under `root`, links followed (each folder once, so loops end), unreadable folders passed over.

    A candidate has an image's suffix, or begins like an image whatever its name.
    """
    listing, lock = Listing(), threading.Lock()
    folders: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    seen: set[tuple[int, int]] = set()
    waiting = [0]  # folders that are queued or at work
    errors: list[BaseException] = []

    def enter(folder: str) -> None:
        try:
            state = os.stat(os.path.join(root, folder))
        except OSError as error:
            with lock:
                listing.unreadable.append((folder, error.strerror or str(error)))
            return
        with lock:
            if (state.st_dev, state.st_ino) in seen:
                return
            seen.add((state.st_dev, state.st_ino))
            waiting[0] += 1
        folders.put(folder)

    def work() -> None:
        while (folder := folders.get()) is not None:
            found: list[Entry] = []
            others = 0
            try:
                with os.scandir(os.path.join(root, folder)) as items:
                    for item in items:
                        path = os.path.join(folder, item.name)
                        if _is_dir(item):
                            enter(path)
                        elif (entry := _candidate(item, path)) is not None:
                            found.append(entry)
                        else:
                            others += 1
            except OSError as error:
                with lock:
                    listing.unreadable.append((folder, error.strerror or str(error)))
            except BaseException as error:  # must reach the caller
                errors.append(error)
            with lock:
                listing.entries += found
                listing.other_files += others
                report(len(listing.entries))
                waiting[0] -= 1
                if waiting[0] == 0:
                    for _ in range(_THREADS):
                        folders.put(None)

    enter("")
    if waiting[0]:
        threads = [threading.Thread(target=work, name="pera-scan", daemon=True) for _ in range(_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    listing.entries.sort(key=lambda entry: entry.path)
    listing.unreadable.sort()
    return listing


def _is_dir(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _candidate(item: os.DirEntry[str], path: str) -> Entry | None:
    named = has_image_suffix(item.name)
    try:
        path.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        return Entry(shown, reason="file name is not UTF-8: rename it") if named else None
    try:
        state = item.stat()
    except OSError as error:
        return Entry(path, reason=f"cannot read: {error.strerror or error}") if named else None
    if not stat.S_ISREG(state.st_mode):
        return Entry(path, reason="cannot read: not a regular file") if named else None
    if not named and not _begins_like_image(item.path):
        return None
    return Entry(path, state.st_size, state.st_mtime_ns)


def _begins_like_image(path: str) -> bool:
    try:
        with open(path, "rb", buffering=0) as file:
            return sniff(file.read(HEAD_BYTES)) is not None
    except OSError:
        return False
