"""`pera-fast data index`: every file of a folder checked once, the result kept and brought up to date."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from pera_fast.data.manifest import Manifest, not_writable
from pera_fast.data.probe import MAX_FILES, ProbeResult, ProbeSettings
from pera_fast.data.sandbox import Sandbox
from pera_fast.data.scan import Entry, Listing, scan
from pera_fast.data.shards import list_shards, locate
from pera_fast.errors import UserError

_log = logging.getLogger("pera_fast")
_BATCH_BYTES = 2**26  # read together by one worker
_FIRST_REASONS = 3


def default_index_path(root: str | os.PathLike[str]) -> Path:
    """Where the manifest of a folder is kept: the user's cache, as the folder itself may be read-only."""
    folder = os.path.realpath(root)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = re.sub(r"[^\w.-]", "_", os.path.basename(folder)) or "root"
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    return Path(cache) / "pera-fast" / "index" / f"{name}-{digest}.parquet"


def load_index(path: str | os.PathLike[str]) -> Manifest:
    """The manifest as it was written. Raises UserError."""
    return Manifest.load(path)


def open_or_build(root: str | os.PathLike[str], cfg: Any, *, progress: bool = True) -> Manifest:
    """The manifest for a run: kept at cfg.data.index (or the default place), brought up to date with the folder."""
    return build_index(
        root,
        out=cfg.data.index,
        verify=cfg.data.verify,
        progress=progress,
        channels=cfg.model.in_chans,
        max_pixels=cfg.data.max_pixels,
    )


def build_index(
    root: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    verify: bool = True,
    workers: int | None = None,
    progress: bool = True,
    channels: int = 3,
    max_pixels: int = 2**28,
    timeout: float = 60.0,
) -> Manifest:
    """Lists a folder, checks what is new or changed since the manifest was written, writes it.

    Args:
        root: the data folder.
        out: the Parquet file; None: `default_index_path`.
        verify: decode every file fully, not only its header. Files that were not verified are when they are first read.
        workers: processes that decode; None: one a core, at most 16.
        progress: show bars, if there is a terminal.
        channels: model.in_chans; decides what may decode and into what.
        max_pixels: larger images are refused.
        timeout: seconds after which a decoder is taken to hang.

    Raises:
        UserError: no such folder, no readable image in it, manifest not writable.
    """
    folder = Path(os.path.abspath(root))
    if not folder.exists():
        raise UserError(f"data folder {root} does not exist")
    if not folder.is_dir():
        raise UserError(f"data {root} is not a folder")
    settings = ProbeSettings(channels, max_pixels, verify)
    target = Path(out) if out is not None else default_index_path(root)
    with _locked(target), _bars(progress) as bars:
        manifest = _update(folder, target, settings, workers or _cores(), timeout, bars)
    _log.info("%s", manifest.summary)
    return manifest


def _update(
    folder: Path, target: Path, settings: ProbeSettings, workers: int, timeout: float, bars: "_Bars"
) -> Manifest:
    version = _dali_version()
    listing = _list(os.fspath(folder), bars)
    for path, reason in listing.unreadable:
        _log.warning("cannot read the folder %s: %s", folder / path, reason)
    known = _reusable(target, settings, version, replace=target == default_index_path(folder))
    kept, unchecked = [], []
    for entry in listing.entries:
        old = known.get(entry.path)
        if (
            old is not None
            and (old.size, old.mtime_ns, old.offset) == (entry.size, entry.mtime_ns, entry.offset)
            and not entry.reason
        ):
            kept.append(old)
        else:
            unchecked.append(entry)
    checked = _check(folder, unchecked, settings, workers, timeout, bars)
    manifest = Manifest.from_results(folder, kept + checked, settings, version)
    gone = len(known) - sum(entry.path in known for entry in listing.entries)
    if not len(manifest.readable):
        raise UserError(_nothing_readable(folder, manifest, listing))
    if checked or gone or not target.exists():
        manifest.save(target)
    manifest.path = target
    manifest.summary = (
        f"index of {folder}: {len(manifest.readable)} of {manifest.table.num_rows} image files are readable"
        f" ({len(kept)} known, {len(checked)} checked, {gone} gone; {target})"
    )
    return manifest


def _list(root: str, bars: "_Bars") -> Listing:
    """The images in a folder's shards, or its image files."""
    return list_shards(root, bars.scanned) or scan(root, bars.scanned)


def _reusable(target: Path, settings: ProbeSettings, version: str, replace: bool) -> dict[str, ProbeResult]:
    """Rows of the last manifest that need no new check while size and mtime stay.

    What is no manifest is overwritten only if told so: the path may be a slip.
    """
    if not target.exists():
        return {}
    try:
        old = Manifest.load(target)
    except UserError as error:
        if not replace:
            raise UserError(f"{error}; delete it or give another data.index") from error
        _log.warning("%s; it is written anew", error)
        return {}
    same = (old.settings.channels, old.settings.max_pixels, old.dali) == (
        settings.channels,
        settings.max_pixels,
        version,
    )
    if not same:
        return {}
    # A header is not enough where a full check is asked for; a file that was not readable at all may have become so.
    return {
        row.path: row for row in old.results() if row.size >= 0 and (row.decoder or not row.ok or not settings.verify)
    }


def _check(
    folder: Path, entries: Sequence[Entry], settings: ProbeSettings, workers: int, timeout: float, bars: "_Bars"
) -> list[ProbeResult]:
    results = [ProbeResult(entry.path, reason=entry.reason, offset=entry.offset) for entry in entries if entry.reason]
    batches = _batches([entry for entry in entries if not entry.reason])
    bars.start_check(sum(map(len, batches)))
    workers = max(1, min(workers, len(batches)))
    root = os.fspath(folder)
    idle: SimpleQueue[Sandbox] = SimpleQueue()
    sandboxes = [Sandbox(timeout) for _ in range(workers)]
    for sandbox in sandboxes:
        idle.put(sandbox)

    def check(batch: list[Entry]) -> list[ProbeResult]:
        sandbox = idle.get()
        try:
            found = sandbox.probe([locate(root, entry.path, entry.offset, entry.size) for entry in batch], settings)
        finally:
            idle.put(sandbox)
        for result, entry in zip(found, batch, strict=True):
            result.path, result.offset = entry.path, entry.offset
        return found

    pool = ThreadPoolExecutor(workers, thread_name_prefix="pera-index")
    try:
        for future in as_completed([pool.submit(check, batch) for batch in batches]):
            found = future.result()
            results += found
            bars.checked(found)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for sandbox in sandboxes:
            sandbox.close()
        pool.shutdown()
    return results


def _batches(entries: Sequence[Entry]) -> list[list[Entry]]:
    batches: list[list[Entry]] = []
    volume = 0
    for entry in entries:
        if not batches or len(batches[-1]) == MAX_FILES or volume + entry.size > _BATCH_BYTES:
            batches.append([])
            volume = 0
        batches[-1].append(entry)
        volume += entry.size
    return batches


def _nothing_readable(folder: Path, manifest: Manifest, listing: Listing) -> str:
    files = len(listing.entries) + listing.other_files
    if not files:
        told = "; ".join(f"{path or '.'}: {reason}" for path, reason in listing.unreadable[:_FIRST_REASONS])
        return f"data folder {folder} holds no files" + (f" ({told})" if told else "")
    failed = manifest.unreadable()
    told = "; ".join(f"{path}: {reason}" for path, reason in failed[:_FIRST_REASONS])
    return f"no readable image among the {files} file(s) in {folder}" + (
        f": {told}" + ("; ..." if len(failed) > _FIRST_REASONS else "") if told else ": none is an image"
    )


def _dali_version() -> str:
    for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


def _cores() -> int:
    return min(len(os.sched_getaffinity(0)), 16)


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One process at a time brings a manifest up to date; the others then find it done."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = open(target.with_name(f".{target.name}.lock"), "a")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(not_writable(target, error)) from error
    with file:
        with contextlib.suppress(OSError):  # no locks on some network disks: the check is then done more than once
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Bars:
    """Progress on a terminal."""

    def __init__(self, display: Any = None):
        self._display = display
        self._scan = self._check = None
        self._failed = 0
        if display is not None:
            self._scan = display.add_task("listing", total=None)

    def scanned(self, found: int) -> None:
        if self._display is not None:
            self._display.update(self._scan, completed=found)

    def start_check(self, total: int) -> None:
        if self._display is not None and total:
            self._check = self._display.add_task("checking", total=total)

    def checked(self, results: list[ProbeResult]) -> None:
        self._failed += sum(not result.ok for result in results)
        if self._display is not None and self._check is not None:
            told = f"checking ({self._failed} not readable)" if self._failed else "checking"
            self._display.update(self._check, advance=len(results), description=told)


@contextlib.contextmanager
def _bars(wanted: bool) -> Iterator[_Bars]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not wanted or not console.is_terminal:
        yield _Bars()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as display:
        yield _Bars(display)
