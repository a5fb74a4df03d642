"""`pera-fast data tile`: cuts large georeferenced scenes into tiles; resumable, each scene whole or not at all."""

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from pera_fast.cores import default_workers
from pera_fast.data.decoding.formats import HEAD_BYTES, refuse_virtual, sniff
from pera_fast.data.decoding.worker_process import DiedError, WorkerProcess
from pera_fast.data.files.companions import not_taken
from pera_fast.data.files.scan import scan
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.tools.state import load, save
from pera_fast.data.tools.tile_grid import TileSettings
from pera_fast.data.tools.tile_scene import TileCounts
from pera_fast.durable import lock
from pera_fast.errors import UserError, one_line
from pera_fast.paths import refuse_inside
from pera_fast.progress import progress_bar
from pera_fast.storage import Storage

_log = logging.getLogger("pera_fast")
_STATE, _SKIPPED = ".tiles", "skipped.csv"
_SECONDS = 600.0  # for one read of a scene and the tiles cut from it
_VRT = "VRT: refers to other files, which may lie here too; name it alone to cut it: pera-fast data tile FILE.vrt"
_TRIES = 8  # of a scene while the storage comes and goes
_MODULE = "pera_fast.data.tools.tile_scene"


def tile(
    scenes: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: TileSettings | None = None,
    *,
    workers: int | None = None,
    progress: bool = True,
    companions: bool = False,
) -> str:
    """Cuts every scene below a folder, or one scene, into tiles: OUT/SCENE/yTOP_xLEFT.tif, and .json beside each.

    Called again it goes on where it was stopped; scenes that have changed since are cut anew. What cannot be read is in
    OUT/skipped.csv. Each scene is read in a process of its own, a bounded window at a time.

    Args:
        scenes: a folder, searched recursively, or a file.
        out: folder of the tiles; new, or of an earlier call with the same settings.
        settings: how the scenes are cut.
        workers: processes; None: one a core.
        progress: show a bar, if there is a terminal.
        companions: cut companions of scenes, and what lies in hidden and trash folders, too.

    Returns:
        One line that sums up.

    Raises:
        UserError: no scenes, none of them readable; settings that cannot be met; `out` holds something else or cannot
            be written.
    """
    settings, source, folder = settings or TileSettings(), Path(scenes), Path(out)
    _check(source, folder, settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder, settings):
            return _tile(source, folder, settings, workers or default_workers(), progress, companions)
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot write there ({error.strerror or error}); the same command goes on from here"
        ) from error


def _check(source: Path, folder: Path, settings: TileSettings) -> None:
    refuse_virtual("scenes", source)
    if not source.exists():
        raise UserError(f"scenes {source} do not exist")
    if settings.size < 16:
        raise UserError(f"--size {settings.size}: must be at least 16 pixels")
    if not 0 <= settings.overlap < settings.size:
        raise UserError(f"--overlap {settings.overlap}: must be at least 0 and less than --size {settings.size}")
    if not 0 <= settings.nodata_max <= 1:
        raise UserError(f"--nodata-max {settings.nodata_max:g}: is a fraction, 0 to 1")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file; give a folder")
    refuse_inside("--out", folder, source)


@contextmanager
def _locked(folder: Path, settings: TileSettings) -> Iterator[None]:
    """The folder, begun with these settings and nobody else at work there."""
    state = folder / _STATE
    if not state.exists() and (other := sorted(os.listdir(folder))):
        raise UserError(f"--out {folder}: holds other files ({other[0]}); give an empty folder")
    state.mkdir(exist_ok=True)
    with open(state / "lock", "w") as file:
        try:
            error = lock(file)
        except BlockingIOError:
            raise UserError(f"--out {folder}: another process is cutting tiles there; wait for it or stop it") from None
        if error:
            _log.info("%s: its disk knows no locks (%s); see that no other process cuts there", folder, error)
        about = state / "settings.json"
        before = load(about)
        changed = [key for key, value in asdict(settings).items() if before.get(key, value) != value]
        if changed:
            told = ", ".join(f"--{key.replace('_', '-')} {one_line(before[key])}" for key in changed)
            raise UserError(f"--out {folder}: was begun with {told}; give the same, or another folder")
        save(about, asdict(settings))
        yield


def _tile(source: Path, folder: Path, settings: TileSettings, workers: int, progress: bool, companions: bool) -> str:
    scenes = _scenes(source, companions)
    root = source if source.is_dir() else source.parent
    names = _folders(list(scenes))
    skipped = SkippedFiles(folder / _SKIPPED)
    done = TileCounts()
    failed: list[tuple[str, str]] = []
    todo = []
    for path, state in scenes.items():
        if source.is_dir() and _is_vrt(source / path):
            failed.append((path, _VRT))
            skipped.add(path, _VRT)
            continue
        before = load(_marker(folder, names[path]))
        counts = [before.get(name) for name in ("written", "left_out")]
        whole = before.get("state") == state and all(type(count) is int and count >= 0 for count in counts)
        if whole and (folder / names[path]).is_dir() == (before["written"] > 0):
            done.written, done.left_out = done.written + before["written"], done.left_out + before["left_out"]
        else:
            todo.append(path)
    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar("scenes", len(scenes), len(scenes) - len(todo), progress))
        cutter = stack.enter_context(_Cutters(root, folder, settings, max(1, min(workers, len(todo)))))
        for path, result in cutter.run([(path, names[path], scenes[path]) for path in todo]):
            if isinstance(result, str):
                failed.append((path, result))
                skipped.add(path, result)
            else:
                done.written, done.left_out = done.written + result.written, done.left_out + result.left_out
            bar(1)
    if failed and len(failed) == len(scenes):
        path, reason = min(failed)
        raise UserError(f"no readable scene among the {len(scenes)} file(s) in {source}: {path}: {reason}")
    told = f", {len(failed)} could not be read ({folder / _SKIPPED})" if failed else ""
    return (
        f"{folder}: {done.written} tiles of {len(scenes) - len(failed)} scenes, {done.left_out} left out for want of"
        f" data{told}"
    )


def _scenes(source: Path, companions: bool) -> dict[str, list[int]]:
    """[bytes, time] of each candidate, by its path below `source`, sorted."""
    if not source.is_dir():
        state = Storage(source)(source.stat, os.fspath(source), 0)
        return {source.name: [state.st_size, state.st_mtime_ns]}
    found: dict[str, list[int]] = {}

    def take(batch: Any) -> None:
        for row in batch.to_pylist():
            found[row["path"]] = [row["size"], row["mtime_ns"]]

    listing = scan(os.fspath(source), take, companions=companions)
    if told := not_taken(listing.left_out):
        _log.warning("%s: %s", source, told)
    for path, reason in listing.unreadable:
        _log.warning("cannot read the folder %s: %s", source / path, reason)
    if not found:
        raise UserError(f"scenes {source} hold no image file among {listing.other_files} file(s)")
    return dict(sorted(found.items()))


def _is_vrt(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return sniff(file.read(HEAD_BYTES)) == "vrt"
    except OSError:  # whoever reads it says so
        return False


def _folders(paths: Sequence[str]) -> dict[str, str]:
    """A folder for each scene: its path in one piece, without suffix and, as WebDataset cuts names at dots, any dot.

    All lie side by side, so that none is in the way of another.
    """
    taken: set[str] = set()
    folders: dict[str, str] = {}
    for path in paths:
        head, _, name = path.rpartition("/")
        stem = name.rpartition(".")[0] or name
        clean = (f"{head}/{stem}" if head else stem).replace("/", "__").replace(".", "_")
        if clean in taken:
            clean = path.replace("/", "__").replace(".", "_")
        while clean in taken:
            clean += "_"
        taken.add(clean)
        folders[path] = clean
    return folders


class _Cutters:
    """Workers that cut scenes. A context manager; leaving it ends them."""

    def __init__(self, root: Path, folder: Path, settings: TileSettings, workers: int):
        self._root, self._folder, self._settings = root.absolute(), folder.absolute(), settings
        self._storage = Storage(self._root)
        self._workers = [WorkerProcess(_MODULE, _SECONDS) for _ in range(workers)]
        self._idle: SimpleQueue[WorkerProcess] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="pera-tile")

    def __enter__(self) -> "_Cutters":
        return self

    def __exit__(self, *_: object) -> None:
        self._storage.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.end()
        self._pool.shutdown()
        for worker in self._workers:
            worker.close()

    def run(self, scenes: list[tuple[str, str, list[int]]]) -> Iterator[tuple[str, TileCounts | str]]:
        """(path, counts or the reason why there are none) of each (path, folder, state), as they come."""
        futures = {self._pool.submit(self._cut, *scene): scene[0] for scene in scenes}
        for future in as_completed(futures):
            yield futures[future], future.result()

    def _cut(self, path: str, name: str, state: list[int]) -> TileCounts | str:
        """Into a folder that takes its place when it is whole."""
        part, marker = self._folder / _STATE / f"scene-{name}.partial", _marker(self._folder, name)
        begun, target = part / "state.json", self._folder / name
        if load(begun).get("state") != state:
            shutil.rmtree(part, ignore_errors=True)
        part.mkdir(exist_ok=True)
        save(begun, {"state": state})
        result = self._cut_into(path, part)
        if isinstance(result, OSError):
            raise result
        if isinstance(result, str):
            shutil.rmtree(part, ignore_errors=True)
            return result
        begun.unlink()
        shutil.rmtree(target, ignore_errors=True)
        if result.written:
            os.replace(part, target)
        else:
            shutil.rmtree(part)
        save(marker, {"state": state, "written": result.written, "left_out": result.left_out})
        return result

    def _cut_into(self, path: str, part: Path) -> TileCounts | str | OSError:
        """The worker's result. GDAL tells no error number, so a failure counts only if the storage was there.

        That shows when the scene is read from end to end, which waits for the storage.
        """
        scene = os.fspath(self._root / path)
        result, told = None, ""
        for _ in range(_TRIES):
            worker = self._idle.get()
            try:
                result = worker.call((scene, path, os.fspath(part), self._settings))
            except DiedError as died:
                return f"rasterio: {died}"
            finally:
                self._idle.put(worker)
            if not isinstance(result, str) or result == told:
                return result
            faults, told = self._storage.faults, result
            try:
                self._storage(lambda: _read_through(scene), scene, 0)
            except OSError as error:
                return f"cannot read: {error.strerror or error}"
            if self._storage.faults != faults:
                told = ""
        assert result is not None
        return result


def _read_through(path: str) -> None:
    with open(path, "rb", buffering=0) as file:
        while os.read(file.fileno(), 2**24):
            pass


def _marker(folder: Path, name: str) -> Path:
    return folder / _STATE / f"scene-{name}.json"
