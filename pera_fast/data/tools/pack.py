"""`pera-fast data pack`: packs the readable images of a folder into shards, resumable and reproducible."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pera_fast.cores import default_workers
from pera_fast.data.ahead import map_ahead
from pera_fast.data.decoding import decode
from pera_fast.data.decoding.probe import os_reason, read_file
from pera_fast.data.files.manifest import Manifest, ReadableFiles
from pera_fast.data.files.shard_writer import ShardWriter, remove_others
from pera_fast.data.files.shards import locate, place_of
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.index.build import build_index
from pera_fast.data.tools.pack_images import ImagePacker, PackSettings, Sample
from pera_fast.durable import lock, read_object, whole_file
from pera_fast.errors import UserError, one_line
from pera_fast.paths import refuse_inside
from pera_fast.progress import progress_bar
from pera_fast.storage import Storage

_log = logging.getLogger("pera_fast")
_STATE, _SOURCE, _SKIPPED, _LOCK = "pack.json", "source.parquet", "skipped.csv", ".lock"
_VERSION = 1
_AHEAD = 8  # files a worker that are read and encoded ahead
_MAX_PIXELS = 2**28


@dataclass
class _Shard:
    name: str
    samples: int
    size: int  # bytes
    next: tuple[int, int]  # (file, its sample) that the next shard begins with


@dataclass
class _State:
    """Progress of packing, kept as pack.json."""

    root: str
    settings: dict[str, Any]
    shards: list[_Shard]
    complete: bool = False

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def save(self, folder: Path) -> None:
        with whole_file(folder / _STATE) as partial:
            partial.write_text(json.dumps({"version": _VERSION, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    def _is_sound(self) -> bool:
        places = [place for shard in self.shards for place in (shard.samples, shard.size, *shard.next)]
        pairs = all(len(shard.next) == 2 and isinstance(shard.name, str) for shard in self.shards)
        numbers = all(type(place) is int and place >= 0 for place in places)
        kinds = isinstance(self.root, str) and isinstance(self.settings, dict) and isinstance(self.complete, bool)
        return pairs and numbers and kinds

    @classmethod
    def load(cls, folder: Path) -> "_State | None":
        try:
            told = read_object(folder / _STATE)
            if told.pop("version") != _VERSION:
                raise ValueError("another version")
            shards = [_Shard(**{**shard, "next": tuple(shard["next"])}) for shard in told.pop("shards")]
            state = cls(**told, shards=shards)
            if not state._is_sound():
                raise ValueError("values of other types")
            return state
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder / _STATE} cannot be read ({one_line(error)}): delete {folder} and pack anew"
            ) from error


def pack(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: PackSettings | None = None,
    *,
    workers: int | None = None,
    progress: bool = True,
    companions: bool = False,
) -> str:
    """Packs every readable image below `root` into shards in `out`; goes on where it was stopped.

    What cannot be read is in `out`/skipped.csv. A resumed pack takes the files that were there when it began.

    Args:
        root: folder of images (or of shards).
        out: folder of the shards; new, empty, or with a pack of `root` with the same settings that was stopped.
        settings: what is done to the images.
        workers: threads that encode; None: one a core.
        progress: show a bar, if there is a terminal.
        companions: pack companions of images, and what lies in hidden and trash folders, too.

    Returns:
        One line that sums up.

    Raises:
        UserError: no images; `out` holds something else or cannot be written.
    """
    settings, folder = settings or PackSettings(), Path(out)
    _check(Path(root), folder, settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            state, manifest = _begin(Path(root), folder, settings, workers, progress, companions)
            if not state.complete:
                _write(manifest, folder, settings, state, workers or default_workers(), progress)
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot write there ({error.strerror or error}); the same command goes on from the last whole"
            " shard"
        ) from error
    size = sum(shard.size for shard in state.shards)
    return f"{folder}: {state.samples} samples in {len(state.shards)} shards, {size / 2**20:.1f} MiB"


def _check(root: Path, folder: Path, settings: PackSettings) -> None:
    if not settings.copies and settings.channels not in (1, 3):
        raise UserError(
            f"--channels {settings.channels}: only images of 1 or 3 channels can be resized, tiled or encoded anew;"
            " leave that out, and the files are packed as they are"
        )
    refuse_inside("--out", folder, root)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file; give a folder")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder / _LOCK, "w") as file:
        try:
            error = lock(file)
        except BlockingIOError:
            raise UserError(f"--out {folder}: another process is packing there; wait for it or stop it") from None
        if error:
            _log.info("%s: its disk knows no locks (%s); see that no other process packs there", folder, error)
        yield


def _begin(
    root: Path, folder: Path, settings: PackSettings, workers: int | None, progress: bool, companions: bool
) -> tuple[_State, Manifest]:
    """Load or start the progress of packing, with the files as they were when it began."""
    state = _State.load(folder)
    if state is None:
        other = sorted(set(os.listdir(folder)) - {_LOCK, _SOURCE, _SKIPPED})
        if other:
            raise UserError(f"--out {folder}: holds other files ({other[0]}); give an empty folder")
        manifest = build_index(
            root, workers=workers, progress=progress, channels=settings.channels, companions=companions
        )
        manifest.save(folder / _SOURCE)
        state = _State(os.fspath(manifest.root), asdict(settings), [])
        state.save(folder)
        return state, manifest
    if state.root != os.path.abspath(root):
        raise UserError(f"--out {folder}: holds the shards of {one_line(state.root)}; give another folder")
    changed = [key for key, value in asdict(settings).items() if state.settings.get(key) != value]
    if changed:
        told = ", ".join(f"{key.replace('_', '-')} {one_line(state.settings.get(key))}" for key in changed)
        raise UserError(f"--out {folder}: was begun with {told}; give the same, or another folder")
    for number, shard in enumerate(state.shards):
        path = folder / shard.name
        if not path.is_file() or path.stat().st_size != shard.size:
            _log.warning("%s is missing or was changed: packing goes on from there", path)
            state.shards, state.complete = state.shards[:number], False
            break
    remove_others(folder, {shard.name for shard in state.shards})
    return state, Manifest.load(folder / _SOURCE)


def _write(
    manifest: Manifest, folder: Path, settings: PackSettings, state: _State, workers: int, progress: bool
) -> None:
    skipped = SkippedFiles(folder / _SKIPPED)
    for path, reason in manifest.unreadable():
        skipped.add(path, reason)
    files = manifest.readable
    first, done = state.shards[-1].next if state.shards else (0, 0)
    limit = int(settings.size_mib * 2**20)
    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar("packing", len(files), first, progress))
        writer: ShardWriter | None = None

        def finish(following: tuple[int, int]) -> None:
            nonlocal writer
            if writer is not None:
                state.shards.append(_Shard(writer.name, writer.samples, writer.finish(), following))
                state.save(folder)
                writer = None

        stack.callback(lambda: writer.discard() if writer is not None else None)
        for row, result in enumerate(_samples(manifest, files, settings, workers, first), start=first):
            if isinstance(result, str):
                skipped.add(files.paths[row].as_py(), result)
                result = []
            for number, sample in enumerate(result):
                if row == first and number < done:
                    continue
                if writer is not None and writer.size_with(sample.members) > limit:
                    finish((row, number))
                writer = writer or ShardWriter(folder, len(state.shards))
                writer.add(sample.key, sample.members)
            bar(1)
        finish((len(files), 0))
    if not state.shards:
        raise UserError(f"no image of {manifest.root} could be packed; see {folder / _SKIPPED}")
    state.complete = True
    state.save(folder)


def _samples(
    manifest: Manifest, files: ReadableFiles, settings: PackSettings, workers: int, first: int
) -> Iterator[list[Sample] | str]:
    """The samples of each file from number `first` on, or why there are none; made ahead by threads."""
    packer, root = ImagePacker(settings), os.fspath(manifest.root)
    storage = Storage(root)
    decode.allow_pixels(_MAX_PIXELS)

    def make(row: int) -> list[Sample] | str:
        path = files.paths[row].as_py()
        location = locate(root, path, int(files.offset[row]), int(files.size[row]))
        try:
            data, state = storage(lambda: read_file(location), *place_of(location))
        except OSError as error:
            return os_reason(error)
        if (state.st_size, state.st_mtime_ns) != (files.size[row], files.mtime_ns[row]):
            return "was changed since the index was made"  # unchecked bytes could kill the decoder
        try:
            size = (int(files.height[row]), int(files.width[row]))
            return packer(row, path, data, files.decoder[row].as_py(), size)
        except Exception as error:  # hostile bytes: any library may raise anything
            return f"cannot be packed: {' '.join(str(error).split())[:160] or type(error).__name__}"

    yield from map_ahead(make, range(first, len(files)), workers, _AHEAD, "pera-pack", storage.close)
