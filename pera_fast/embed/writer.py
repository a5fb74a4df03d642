"""Runs a frozen network over the images of a folder, and writes parts of the table as they come."""

import os
import time
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pera_fast.config import Config
from pera_fast.cores import default_workers
from pera_fast.data.decoding.tar import Member
from pera_fast.data.files.manifest import Manifest
from pera_fast.data.files.shards import locate
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.loading.whole import WholeBatch, WholeImages
from pera_fast.data.tools.file_places import FilePlace, FilePlaces
from pera_fast.embed.parts import Parts
from pera_fast.embed.table import About, rows
from pera_fast.errors import UserError
from pera_fast.features.extract import Extractor, pool
from pera_fast.progress import progress_bar
from pera_fast.storage import MachineError

_PART_BYTES, _PART_SECONDS = 2**25, 30.0  # of a part, before it is written
_MOST_PLACES, _CORES_PLACES = 8, 4  # processes that look up places, one for so many cores: a file takes 1 to 2 ms
Features = tuple[WholeBatch, np.ndarray, np.ndarray | None]  # images, vectors [n, D], patches [n, L, D]; float16


class StoppedError(UserError):
    """Ctrl-C; what is embedded so far is kept."""

    exit_code = 130


@dataclass
class _Held:
    """Features of a batch that are not written yet."""

    stop: int
    paths: list[str]
    places: "Future[list[FilePlace | None]]"
    vectors: np.ndarray
    patches: np.ndarray | None


class Writer:
    """Embeds what is left of a folder.

    Args:
        cfg: how images are read.
        manifest: of the folder.
        extractor: the network.
        about: what is asked for.
        parts: where the rows go.
        skipped: where files that cannot be used are reported.
    """

    def __init__(
        self,
        cfg: Config,
        manifest: Manifest,
        extractor: Extractor,
        about: About,
        parts: Parts,
        skipped: SkippedFiles,
    ):
        self._cfg, self._manifest, self._extractor = cfg, manifest, extractor
        self._about, self._parts, self._skipped = about, parts, skipped
        self._held: list[_Held] = []
        self._written = time.monotonic()

    def run(self, progress: bool) -> float:
        """Embeds what is left; returns images a second, 0 where nothing is.

        Raises:
            StoppedError: Ctrl-C.
            MachineError: the storage did not answer in time.
        """
        files, done = self._manifest.readable, self._parts.done
        if done >= len(files):
            return 0.0
        images = WholeImages(
            self._cfg, self._manifest, size=self._about.size, batch_size=self._about.batch_size,
            device=self._extractor.device, skipped=self._skipped,
        )  # fmt: skip
        count, before, began = 0, done, time.monotonic()
        workers = default_workers(_MOST_PLACES * _CORES_PLACES) // _CORES_PLACES or 1
        with (
            FilePlaces(workers) as places,
            ThreadPoolExecutor(workers, thread_name_prefix="pera-places") as looking,
            progress_bar("embed", len(files), done, progress) as advance,
            closing(self._features(images.batches(done))) as made,
        ):
            try:
                for batch, vectors, patches in made:
                    paths, locations = self._located(batch.rows)
                    self._hold(_Held(batch.stop, paths, looking.submit(places, locations), vectors, patches))
                    count += len(batch.rows)
                    advance(batch.stop - before)
                    before = batch.stop
                self._flush()
            except MachineError:
                self._flush()
                raise
            except KeyboardInterrupt:
                self._flush()
                told = f"stopped after {self._parts.done} of {len(files)} files"
                raise StoppedError(f"{told}; the same command with --resume goes on") from None
        return count / max(time.monotonic() - began, 1e-9)

    def _features(self, batches: Generator[WholeBatch, None, None]) -> Generator[Features, None, None]:
        """Features of each batch. On a GPU the next batch is begun before one is waited for."""
        begun: tuple[WholeBatch, Tensor, Tensor | None] | None = None
        with closing(batches):
            for batch in batches:
                launched = batch, *self._launch(batch.pixels)
                if begun is not None:
                    yield self._fetched(*begun)
                begun = launched
            if begun is not None:
                yield self._fetched(*begun)

    def _launch(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        about = self._about
        if not len(pixels):
            empty = torch.empty(0, about.positions, about.patch_width, dtype=torch.float16)
            return torch.empty(0, about.width, dtype=torch.float16), empty if about.patches else None
        cls, patches = self._extractor.tokens(pixels)[0]
        vectors = pool({"cls": cls.float(), "mean": patches.float().mean(1)}, about.pooling)
        return vectors.half(), patches.half() if about.patches else None

    def _fetched(self, batch: WholeBatch, vectors: Tensor, patches: Tensor | None) -> Features:
        fetched = vectors.cpu().numpy()
        if not np.isfinite(fetched).all():
            row = int(batch.rows[~np.isfinite(fetched).all(axis=1)][0])
            path = self._manifest.readable.paths[row].as_py()
            raise UserError(f"{path}: its features are not finite in float16; are these weights damaged?")
        return batch, fetched, None if patches is None else patches.cpu().numpy()

    def _located(self, chosen: np.ndarray) -> tuple[list[str], Sequence[str | Member]]:
        files, root = self._manifest.readable, os.fspath(self._manifest.root)
        paths = [files.paths[int(row)].as_py() for row in chosen]
        located = [
            locate(root, path, int(files.offset[row]), int(files.size[row]))
            for path, row in zip(paths, chosen, strict=True)
        ]
        return paths, located

    def _hold(self, held: _Held) -> None:
        self._held.append(held)
        size = sum(len(each.paths) for each in self._held) * self._about.row_bytes
        if size >= _PART_BYTES or time.monotonic() - self._written >= _PART_SECONDS:
            self._flush()

    def _flush(self) -> None:
        """Write what is held as a part."""
        if not self._held:
            return
        held, self._held = self._held, []
        patches = [each.patches for each in held if each.patches is not None]
        table = rows(
            self._about,
            [path for each in held for path in each.paths],
            [place for each in held for place in each.places.result()],
            np.concatenate([each.vectors for each in held]),
            np.concatenate(patches) if patches else None,
        )
        self._parts.add(held[-1].stop, table)
        self._written = time.monotonic()
