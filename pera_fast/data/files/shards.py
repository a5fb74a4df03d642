"""Reads folders of shards: tar files of images, as `data pack` and the webdataset tools write them.

A folder is one of shards if there are tar files in it and no image files. Every member of a tar that is named like an
image is a sample, also where several share a key; the other members (labels, JSON) are left alone.
"""

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from pera_fast.data.decoding.formats import has_image_suffix
from pera_fast.data.decoding.tar import Member, TarDamageError, list_members
from pera_fast.data.files.companions import FOLDERS, companion, hides, path_companion
from pera_fast.data.files.scan import BATCH_ROWS, Listing, Rows, is_dir
from pera_fast.data.files.shard_index import read_index
from pera_fast.storage import Storage

_log = logging.getLogger("pera_fast")
SUFFIX = ".tar"
_THREADS = 8


def locate(root: str, path: str, offset: int, size: int) -> str | Member:
    """Location of a manifest's row: a path, or a member of a shard (offset >= 0)."""
    if offset < 0:
        return os.path.join(root, path)
    shard, name = split_path(path)
    return Member(os.path.join(root, shard), name, offset, size)


def place_of(location: str | Member) -> tuple[str, int]:
    """(file, offset of the content in bytes) of a location."""
    return (location.tar, location.offset) if isinstance(location, Member) else (location, 0)


def split_path(path: str) -> tuple[str, str]:
    """(shard, member) of a sample's path in a manifest: SHARD.tar/MEMBER."""
    shard, _, name = path.partition(f"{SUFFIX}/")
    return shard + SUFFIX, name


def file_of(path: str, offset: int) -> str:
    """The file, relative to the data folder, that a manifest's row lies in."""
    return path if offset < 0 else split_path(path)[0]


def list_shards(
    root: str,
    emit: Callable[[pa.RecordBatch], None],
    report: Callable[[int], None] = lambda found: None,
    storage: Storage | None = None,
    companions: bool = False,
) -> Listing | None:
    """All images in the shards below `root`; None if it is not a folder of shards.

    What is wrong with a shard is an entry of its own, under the shard's name.

    Args:
        root: the folder.
        emit: takes record batches (scan.LISTED), in no order; called by one thread at a time.
        report: told now and then how many images there are so far.
        storage: waits where the storage is away; None: one of its own.
        companions: hand on companions of images, and what lies in hidden and trash folders, too.

    Raises:
        MachineError: the storage did not answer in time.
    """
    listing, storage = Listing(), storage or Storage(root)
    shards = _find(root, listing, storage, companions)
    if not shards:
        return None
    lock = threading.Lock()

    def left_out(path: str) -> bool:
        kind = None if companions else path_companion(path)
        if kind is not None:
            with lock:
                listing.left_out[kind] += 1
        return kind is not None

    def take(rows: Rows) -> None:
        if not len(rows):
            return
        with lock:
            listing.files += len(rows)
            emit(rows.batch())
            report(listing.files)

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="pera-scan") as pool:  # on a network disk it is all waiting
        try:
            listing.other_files = sum(pool.map(lambda shard: _list_shard(root, shard, take, storage, left_out), shards))
        except BaseException:  # Ctrl-C, while threads wait for the storage
            storage.close()
            pool.shutdown(cancel_futures=True)
            raise
    return listing


def _find(root: str, listing: Listing, storage: Storage, companions: bool) -> list[str]:
    """Paths of the tar files, relative to `root` and sorted; none if there is an image file."""
    shards: list[str] = []
    seen: set[tuple[int, int]] = set()
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            where = os.path.join(root, folder)
            state = storage(lambda where=where: os.stat(where), where)
            if (state.st_dev, state.st_ino) in seen:  # links that lead in circles
                continue
            seen.add((state.st_dev, state.st_ino))
            below, tars, images = storage(lambda folder=folder: _look(root, folder, storage, companions), where)
        except OSError as error:
            listing.unreadable.append((folder or ".", error.strerror or str(error)))
            continue
        shards += tars
        if images:
            if shards:
                _log.warning("%s holds image files and tar files: the tar files are left alone", root)
            return []
        hidden = [] if companions else [path for path in below if hides(os.path.basename(path))]
        listing.left_out[FOLDERS] += len(hidden)
        folders += sorted(set(below) - set(hidden), reverse=True)
    listing.left_out += Counter()  # without those of none
    return sorted(shards)


def _look(root: str, folder: str, storage: Storage, companions: bool) -> tuple[list[str], list[str], bool]:
    """(folders, tar files, whether there is an image file) in a folder, of however many files."""
    folders: list[str] = []
    tars: list[str] = []
    images = False
    with os.scandir(os.path.join(root, folder)) as items:
        for item in items:
            tar = item.name.endswith(SUFFIX)
            if is_dir(item, storage):
                folders += [] if tar else [os.path.join(folder, item.name)]
            elif tar and not item.name.startswith("."):
                tars.append(os.path.join(folder, item.name))
            else:
                images = images or (has_image_suffix(item.name) and (companions or companion(item.name) is None))
    return folders, tars, images


def _list_shard(
    root: str, shard: str, take: Callable[[Rows], None], storage: Storage, left_out: Callable[[str], bool]
) -> int:
    """Hands on the images of one shard that are not left out; returns the number of its other members."""
    rows = Rows()
    names: set[str] = set()
    seen: set[int] = set()  # offsets of members, which a second look leaves out
    others = 0
    where = os.path.join(root, shard)

    def look() -> None:
        nonlocal others
        mtime_ns = os.stat(where).st_mtime_ns
        for found in read_index(where) or list_members(where):
            if found.offset in seen:
                continue
            seen.add(found.offset)
            if not has_image_suffix(found.name):
                others += 1
                continue
            if left_out(found.name):
                continue
            path, reason = f"{shard}/{found.name}", found.reason
            if (shown := _shown(path)) != path:
                path, reason = shown, "name is not UTF-8"
            if path in names:
                path, reason = f"{path} (at byte {found.offset})", "the shard has this name twice: the first is used"
            names.add(path)
            rows.add(path, found.size, mtime_ns, reason, found.offset)
            if len(rows) >= BATCH_ROWS:
                take(rows)

    try:
        storage(look, where)
    except OSError as error:
        rows.add(_shown(shard), reason=f"cannot read: {error.strerror or error}")
    except TarDamageError as error:
        rows.add(_shown(shard), reason=f"{error}; {len(names)} image(s) stand before that")
    take(rows)
    return others


def _shown(path: str) -> str:
    """The path as text, which a name that is not UTF-8 is not."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
