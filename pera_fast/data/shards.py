"""Folders of shards: tar files of images, as `data pack` and the webdataset tools write them.

A folder is one of shards if there are tar files in it and no image files. Every member of a tar that is named like an
image is a sample, also where several share a key; the other members (labels, JSON) are left alone.
"""

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from pera_fast.data.formats import has_image_suffix
from pera_fast.data.scan import Entry, Listing
from pera_fast.data.tar import Member, TarDamageError, list_members

_log = logging.getLogger("pera_fast")
SUFFIX = ".tar"
_THREADS = 8


def locate(root: str, path: str, offset: int, size: int) -> str | Member:
    """Where a manifest's row lies: a path, or the member of a shard (offset >= 0)."""
    if offset < 0:
        return os.path.join(root, path)
    shard, name = split_path(path)
    return Member(os.path.join(root, shard), name, offset, size)


def split_path(path: str) -> tuple[str, str]:
    """(shard, member) of a sample's path in a manifest: SHARD.tar/MEMBER."""
    shard, _, name = path.partition(f"{SUFFIX}/")
    return shard + SUFFIX, name


def file_of(path: str, offset: int) -> str:
    """The file, relative to the data folder, that a manifest's row lies in."""
    return path if offset < 0 else split_path(path)[0]


def list_shards(root: str, report: Callable[[int], None] = lambda found: None) -> Listing | None:
    """All images in the shards below `root`; None if it is not a folder of shards.

    What is wrong with a shard is an entry of its own, under the shard's name.
    """
    listing = Listing()
    shards = _find(root, listing.unreadable)
    if not shards:
        return None
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="pera-scan") as pool:  # on a network disk it is all waiting
        for entries, others in pool.map(lambda shard: _list_shard(root, shard), shards):
            listing.entries += entries
            listing.other_files += others
            report(len(listing.entries))
    listing.entries.sort(key=lambda entry: (entry.path, entry.offset))
    return listing


def _find(root: str, unreadable: list[tuple[str, str]]) -> list[str]:
    """Paths of the tar files, relative to `root` and sorted; none if there is an image file."""

    def note(error: OSError) -> None:
        unreadable.append((os.path.relpath(error.filename or root, root), error.strerror or str(error)))

    shards: list[str] = []
    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, onerror=note, followlinks=True):
        try:
            state = os.stat(folder)
        except OSError as error:
            note(error)
            continue
        if (state.st_dev, state.st_ino) in seen:  # links that lead in circles
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        here = [name for name in names if name.endswith(SUFFIX) and not name.startswith(".")]
        shards += [os.path.relpath(os.path.join(folder, name), root) for name in here]
        if any(has_image_suffix(name) for name in names):
            if shards:
                _log.warning("%s holds image files and tar files: the tar files are left alone", root)
            return []
        folders[:] = sorted(name for name in folders if not name.endswith(SUFFIX))
    return sorted(shards)


def _list_shard(root: str, shard: str) -> tuple[list[Entry], int]:
    """Entries of one shard, and the number of its other members."""
    entries: list[Entry] = []
    names: set[str] = set()
    others = 0
    try:
        mtime_ns = os.stat(os.path.join(root, shard)).st_mtime_ns
        for found in list_members(os.path.join(root, shard)):
            if not has_image_suffix(found.name):
                others += 1
                continue
            path, reason = f"{shard}/{found.name}", found.reason
            if (shown := _shown(path)) != path:
                path, reason = shown, "name is not UTF-8"
            if path in names:
                path, reason = f"{path} (at byte {found.offset})", "the shard has this name twice: the first is used"
            names.add(path)
            entries.append(Entry(path, found.size, mtime_ns, reason=reason, offset=found.offset))
    except OSError as error:
        entries.append(Entry(_shown(shard), reason=f"cannot read: {error.strerror or error}"))
    except TarDamageError as error:
        entries.append(Entry(_shown(shard), reason=f"{error}; {len(entries)} image(s) stand before that"))
    return entries, others


def _shown(path: str) -> str:
    """The path as text, which a name that is not UTF-8 is not."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
