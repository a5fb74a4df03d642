"""`pera-fast data index`: checks every file of a folder once, and keeps the manifest up to date."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import logging
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from pera_fast.config import Config
from pera_fast.cores import default_workers
from pera_fast.data.bands.sensor import band_plan, is_deep, measure, probe_settings
from pera_fast.data.decoding.band_numbers import Bands
from pera_fast.data.decoding.formats import refuse_virtual
from pera_fast.data.decoding.probe import ProbeSettings
from pera_fast.data.files.companions import not_taken
from pera_fast.data.files.manifest import Manifest, ManifestWriter, StoredManifest, not_writable
from pera_fast.data.files.scan import LISTED, Listing, scan
from pera_fast.data.files.shards import list_shards
from pera_fast.data.index.bars import Bars, bars
from pera_fast.data.index.checks import Checks
from pera_fast.data.index.journal import Journal
from pera_fast.data.index.known import FIRST_REASONS, Counts, Known, tasks
from pera_fast.data.index.sorted_parts import SortedParts, Tables, side_by_side
from pera_fast.errors import UserError
from pera_fast.storage import TIMEOUT, Storage

_log = logging.getLogger("pera_fast")
_MOST_WORKERS = 16
_said: set[tuple[Path, str]] = set()  # what was left out of folders


def default_index_path(root: str | os.PathLike[str]) -> Path:
    """Default path of a folder's manifest: in the user's cache, because the folder may be read-only."""
    folder = os.path.realpath(root)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = re.sub(r"[^\w.-]", "_", os.path.basename(folder)) or "root"
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    return Path(cache) / "pera-fast" / "index" / f"{name}-{digest}.parquet"


def load_index(path: str | os.PathLike[str]) -> Manifest:
    """The manifest as it was written. Raises UserError."""
    return Manifest.load(path)


def open_or_build(root: str | os.PathLike[str], cfg: Config, *, progress: bool = True) -> Manifest:
    """`index_for`, with the depth and the ranges of its bands decided: `sensor.band_plan` has them."""
    manifest, depth = _index_for(root, cfg, None, progress)
    measure(cfg, manifest, depth, progress)
    return manifest


def index_for(
    root: str | os.PathLike[str], cfg: Config, *, workers: int | None = None, progress: bool = True
) -> Manifest:
    """The manifest for a run: kept at cfg.data.index (or the default place), brought up to date with the folder.

    Arguments and errors as of `build_index`.
    """
    return _index_for(root, cfg, workers, progress)[0]


def _index_for(root: str | os.PathLike[str], cfg: Config, workers: int | None, progress: bool) -> tuple[Manifest, int]:
    """The manifest, and what data.depth comes to: it decides which decoders check the files."""

    def build(settings: ProbeSettings) -> Manifest:
        return build_index(
            root,
            out=cfg.data.index,
            verify=cfg.data.verify,
            workers=workers,
            progress=progress,
            channels=settings.channels,
            max_pixels=cfg.data.max_pixels,
            bands=settings.bands,
            scaled=settings.scaled,
            storage_timeout=cfg.data.storage_timeout,
            companions=cfg.data.companions,
        )

    settings = probe_settings(cfg)
    if cfg.data.depth != "auto":
        return build(settings), int(cfg.data.depth)
    if settings.encoded and _were_scaled(cfg.data.index or default_index_path(root)):
        settings = replace(settings, scaled=True)  # it will come out so again
    manifest = build(settings)
    depth = 16 if is_deep(manifest) else 8
    needed = probe_settings(cfg, replace(band_plan(cfg), depth=depth))
    return manifest if needed.decoders == settings.decoders else build(needed), depth


def _were_scaled(target: str | os.PathLike[str]) -> bool:
    """Whether the images of the last index, if there is one, were to be scaled."""
    with contextlib.suppress(UserError), StoredManifest(Path(target)) as stored:
        return stored.settings.scaled
    return False


def build_index(
    root: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    verify: bool = True,
    workers: int | None = None,
    progress: bool = True,
    channels: int = 3,
    max_pixels: int = 2**28,
    bands: Bands = (),
    scaled: bool = False,
    timeout: float = 60.0,
    storage_timeout: float = TIMEOUT,
    companions: bool = False,
) -> Manifest:
    """Lists a folder, checks what is new or changed since the manifest was written, writes it.

    Nothing here grows with the number of files but the manifest that is returned. What was checked before the process
    was killed is not checked again.

    Args:
        root: the data folder.
        out: the Parquet file; None: `default_index_path`.
        verify: decode every file fully, not only its header. Files that were not verified are when they are first read.
        workers: processes that decode; None: one a core, at most 16.
        progress: show bars, if there is a terminal.
        channels: model.in_chans; decides what may decode and into what.
        max_pixels: larger images are refused.
        bands: data.bands; a file without them is not readable.
        scaled: values are scaled by us, not by DALI.
        timeout: seconds after which a decoder is taken to hang.
        storage_timeout: seconds that are waited for a storage that does not answer.
        companions: take companions of images, and what lies in hidden and trash folders, too.

    Raises:
        UserError: no such folder, no readable image in it, manifest not writable.
        MachineError: the storage did not answer in time; what was checked is kept.
    """
    refuse_virtual("data", root)
    folder = Path(os.path.abspath(root))
    storage = Storage(folder, storage_timeout)
    if not os.path.lexists(folder):
        raise UserError(f"data folder {root} does not exist")
    if not stat.S_ISDIR(storage(lambda: os.stat(folder), os.fspath(folder)).st_mode):
        raise UserError(f"data {root} is not a folder")
    settings = ProbeSettings(channels, max_pixels, verify, bands, scaled)
    target = Path(out) if out is not None else default_index_path(root)
    try:
        with _locked(target), bars(progress) as shown:
            manifest = _update(
                folder, target, settings, workers or default_workers(_MOST_WORKERS), timeout, shown, storage, companions
            )
    except KeyboardInterrupt:
        _log.warning("stopped; what was checked is kept, and the next index of %s goes on from there", folder)
        raise
    _log.info("%s", manifest.summary)
    return manifest


def _update(
    folder: Path,
    target: Path,
    settings: ProbeSettings,
    workers: int,
    timeout: float,
    bars: "Bars",
    storage: Storage,
    companions: bool,
) -> Manifest:
    version = _dali_version()
    counts = Counts()
    known = Known(settings, version)
    old = known.manifest(target, replace=target == default_index_path(folder))
    with (
        Journal(target, folder, settings, version) as journal,
        ManifestWriter(target, folder, settings, version) as writer,
        Checks(folder, settings, workers, timeout, storage) as checks,
    ):
        listed = SortedParts(journal.folder, LISTED)

        def add(batch: pa.RecordBatch) -> None:
            with _of_index(target):
                listed.add(batch)

        try:
            where = os.fspath(folder), add, bars.scanned, storage, companions
            listing = list_shards(*where) or scan(*where)  # the images in its shards, or its image files
            for path, reason in listing.unreadable:
                _log.warning("cannot read the folder %s: %s", folder / path, reason)
            _say_left_out(folder, listing)
            bars.start_check(listing.files)
            streams = [*(known.parts(parts) for parts in journal.earlier()), *old]
            pieces: list[pa.Table] = []
            with _of_index(target):
                found = [_read_back(rows, target) for rows in listed.streams()]
            for checked, rows in checks.run(tasks(side_by_side(found, streams), counts)):
                pieces.append(rows)
                counts.add(rows, checked)
                bars.done(rows.num_rows, counts.failed)
                if checked:
                    journal.add(rows)
                else:  # the end of a range of paths
                    writer.write(pa.concat_tables(pieces).sort_by("path"))
                    pieces = []
        finally:
            listed.delete()
        if counts.readable and (counts.checked or counts.gone or not target.exists()):
            writer.commit()
        journal.delete()
    if not counts.readable:
        raise UserError(_nothing_readable(folder, counts, listing))
    manifest = Manifest.load(target)
    manifest.root = folder
    manifest.summary = (
        f"index of {folder}: {counts.readable} of {listing.files} image files are readable"
        f" ({counts.kept} known, {counts.checked} checked, {counts.gone} gone; {target})"
    )
    return manifest


def _say_left_out(folder: Path, listing: Listing) -> None:
    """Once for each folder: the index of one may be made twice in a run."""
    told = not_taken(listing.left_out)
    if told and (folder, told) not in _said:
        _said.add((folder, told))
        _log.warning("%s: %s", folder, told)


@contextlib.contextmanager
def _of_index(target: Path) -> Iterator[None]:
    """Inside, an OSError is one of the index's own files."""
    try:
        yield
    except OSError as error:
        raise UserError(not_writable(target, error)) from error


def _read_back(rows: Tables, target: Path) -> Tables:
    with _of_index(target):
        yield from rows


def _nothing_readable(folder: Path, counts: Counts, listing: Listing) -> str:
    files = listing.files + listing.other_files
    if not files and listing.left_out:
        return f"data folder {folder} holds no image; {not_taken(listing.left_out)}"
    if not files:
        told = "; ".join(f"{path or '.'}: {reason}" for path, reason in listing.unreadable[:FIRST_REASONS])
        return f"data folder {folder} holds no files" + (f" ({told})" if told else "")
    told = "; ".join(f"{path}: {reason}" for path, reason in counts.reasons[:FIRST_REASONS])
    return f"no readable image among the {files} file(s) in {folder}" + (
        f": {told}" + ("; ..." if counts.failed > FIRST_REASONS else "") if told else ": none is an image"
    )


def _dali_version() -> str:
    for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


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
