"""`pera-fast data stack`: one GeoTIFF of all bands from files of one band each, scene by scene."""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from pera_fast.cores import default_workers
from pera_fast.data.decoding.worker_process import DiedError, WorkerProcess
from pera_fast.data.files.band_files import PATTERN, scenes_of
from pera_fast.data.files.scan import scan
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.tools import state
from pera_fast.durable import lock
from pera_fast.errors import UserError
from pera_fast.paths import local_path, refuse_inside
from pera_fast.progress import progress_bar
from pera_fast.storage import Storage

_log = logging.getLogger("pera_fast")
_STATE, _SKIPPED = ".stack", "skipped.csv"
_SECONDS = 600.0  # for a row of windows
_MODULE = "pera_fast.data.tools.stack_scene"


@dataclass(frozen=True)
class StackSettings:
    """Settings of a stack.

    Attributes:
        bands: names of the bands, in the order of the GeoTIFF; empty: those that all scenes have.
        pattern: regular expression with a group `band`, and perhaps `metres`, searched in each file's name.
        resampling: of bands that are coarser than the finest: nearest, bilinear or cubic.
    """

    bands: tuple[str, ...] = ()
    pattern: str = PATTERN
    resampling: str = "bilinear"


@dataclass(frozen=True)
class _Scene:
    name: str
    files: dict[str, str]  # band: path below the source
    about: dict[str, Any]  # what it is made of; another one is made anew


def stack(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: StackSettings | None = None,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> str:
    """Stacks the bands of every scene below a folder: OUT/SCENE.tif, with the names of the bands and the scene's place.

    All bands get the grid of the finest one. Called again it goes on where it was stopped. Scenes that cannot be
    stacked are in OUT/skipped.csv. Each scene is read in a process of its own, a window at a time.

    Args:
        source: a folder, searched recursively, such as one of .SAFE folders.
        out: folder for the GeoTIFFs.
        settings: how they are stacked.
        workers: processes; None: one a core.
        progress: show a bar, if there is a terminal.

    Returns:
        One line that sums up.

    Raises:
        UserError: no files that name a band, none that can be stacked, bands that no scene has; `out` cannot be
            written.
    """
    settings, root, folder = settings or StackSettings(), local_path("", source), local_path("--out", out)
    pattern = _pattern(settings)
    if not root.is_dir():
        raise UserError(f"folder {root} does not exist")
    refuse_inside("--out", folder, root)
    scenes, told = _scenes(root, settings, pattern)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            failed = _stack(root, folder, scenes, settings, workers or default_workers(), progress)
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot write there ({error.strerror or error}); the same command goes on from here"
        ) from error
    if len(failed) == len(scenes):
        raise UserError(f"none of the {len(scenes)} scene(s) in {root} can be stacked: {failed[0][0]}: {failed[0][1]}")
    bands = ",".join(next(iter(scenes)).files)
    skipped = f", {len(failed)} cannot be stacked ({folder / _SKIPPED})" if failed else ""
    return f"{folder}: {len(scenes) - len(failed)} scenes of bands {bands}{skipped}{told}"


def _pattern(settings: StackSettings) -> re.Pattern[str]:
    try:
        pattern = re.compile(settings.pattern)
    except re.error as error:
        raise UserError(f"--pattern {settings.pattern}: no regular expression ({error})") from None
    if "band" not in pattern.groupindex:
        raise UserError(f"--pattern {settings.pattern}: has no group (?P<band>...)")
    return pattern


def _scenes(root: Path, settings: StackSettings, pattern: re.Pattern[str]) -> tuple[list[_Scene], str]:
    """Scenes with the same bands, and what is to be said of the rest."""
    found: dict[str, list[int]] = {}

    def take(batch: Any) -> None:
        for row in batch.to_pylist():
            found[row["path"]] = [row["size"], row["mtime_ns"]]

    listing = scan(os.fspath(root), take)
    for path, reason in listing.unreadable:
        _log.warning("cannot read the folder %s: %s", root / path, reason)
    scenes, others = scenes_of(found, pattern)
    if not scenes:
        raise UserError(f"folder {root}: none of its {len(found)} image file(s) names a band; give --pattern")
    bands = settings.bands or _shared(scenes.values())
    if not bands:
        raise UserError(f"folder {root}: its {len(scenes)} scene(s) have no band in common; give --bands")
    whole = {name: files for name, files in scenes.items() if all(band in files for band in bands)}
    if not whole:
        lacking = next(band for band in bands if not any(band in files for files in scenes.values()))
        have = ", ".join(dict.fromkeys(band for files in scenes.values() for band in files))
        raise UserError(f"--bands {','.join(bands)}: no scene in {root} has {lacking}; there are {have}")
    left = dict.fromkeys(band for files in scenes.values() for band in files if band not in bands)
    told = f"; left out: band {', '.join(left)}" if left else ""
    told += f"; {len(scenes) - len(whole)} scene(s) lack a band" if len(whole) < len(scenes) else ""
    told += f"; {len(others)} file(s) name no band" if others else ""
    made = []
    for name, files in whole.items():
        chosen = {band: files[band] for band in bands}
        made_of = [[band, path, *found[path]] for band, path in chosen.items()]  # a list, because the order counts
        about = {"files": made_of, "how": settings.resampling}
        made.append(_Scene(name.replace("/", "__"), chosen, about))
    return made, told


def _shared(scenes: Sequence[dict[str, str]] | Any) -> tuple[str, ...]:
    """Bands that all scenes have, in their order."""
    first, *rest = scenes
    return tuple(band for band in first if all(band in files for files in rest))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder, with nobody else at work there."""
    marks = folder / _STATE
    if not marks.exists() and (other := sorted(os.listdir(folder))):
        raise UserError(f"--out {folder}: holds other files ({other[0]}); give an empty folder")
    marks.mkdir(exist_ok=True)
    with open(marks / "lock", "w") as file:
        try:
            error = lock(file)
        except BlockingIOError:
            raise UserError(f"--out {folder}: another process is stacking there; wait for it or stop it") from None
        if error:
            _log.info("%s: its disk knows no locks (%s); see that no other process stacks there", folder, error)
        yield


def _stack(
    root: Path, folder: Path, scenes: list[_Scene], settings: StackSettings, workers: int, progress: bool
) -> list[tuple[str, str]]:
    """Stacks what is not done. Returns the scenes that failed, with their reasons."""
    todo = [scene for scene in scenes if not _is_done(folder, scene)]
    skipped, failed = SkippedFiles(folder / _SKIPPED), []
    with (
        progress_bar("scenes", len(scenes), len(scenes) - len(todo), progress) as bar,
        _Stackers(root, folder, settings, max(1, min(workers, len(todo)))) as stackers,
    ):
        for scene, reason in stackers.run(todo):
            if reason:
                failed.append((scene.name, reason))
                skipped.add(scene.name, reason)
            bar(1)
    return sorted(failed)


def _is_done(folder: Path, scene: _Scene) -> bool:
    return state.load(_marker(folder, scene)) == scene.about and (folder / f"{scene.name}.tif").exists()


def _marker(folder: Path, scene: _Scene) -> Path:
    return folder / _STATE / f"scene-{scene.name}.json"


class _Stackers:
    """Workers that stack scenes. A context manager; leaving it ends them."""

    def __init__(self, root: Path, folder: Path, settings: StackSettings, workers: int):
        self._root, self._folder, self._settings = root.absolute(), folder.absolute(), settings
        self._storage = Storage(self._root)
        self._workers = [WorkerProcess(_MODULE, _SECONDS) for _ in range(workers)]
        self._idle: SimpleQueue[WorkerProcess] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="pera-stack")

    def __enter__(self) -> "_Stackers":
        return self

    def __exit__(self, *_: object) -> None:
        self._storage.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.end()
        self._pool.shutdown()
        for worker in self._workers:
            worker.close()

    def run(self, scenes: list[_Scene]) -> Iterator[tuple[_Scene, str]]:
        """(scene, why it cannot be stacked; empty: it is) as they come. Raises OSError if `folder` fails."""
        futures = {self._pool.submit(self._stack, scene): scene for scene in scenes}
        for future in as_completed(futures):
            yield futures[future], future.result()

    def _stack(self, scene: _Scene) -> str:
        files = {band: os.fspath(self._root / path) for band, path in scene.files.items()}
        for path in files.values():  # GDAL tells no error number: here a storage that is away is waited for
            try:
                self._storage(lambda path=path: os.stat(path), path)
            except OSError as error:
                return f"cannot read {path}: {error.strerror or error}"
        target = self._folder / f"{scene.name}.tif"
        worker = self._idle.get()
        try:
            result = worker.call((files, os.fspath(target), self._settings.resampling))
        except DiedError as died:
            return f"rasterio: {died}"
        finally:
            self._idle.put(worker)
        if isinstance(result, OSError):
            raise result
        if not result:
            state.save(_marker(self._folder, scene), scene.about)
        return result
