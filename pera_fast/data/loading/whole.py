"""Decodes whole images in the order of a manifest, ahead of the network that takes them.

An in-order pass without augmentation, by the decoders of training: each image becomes one square, and a file that
cannot be used is left out and reported; nothing takes its place. JPEG files are decoded at their full size, so that
features are those of `features.images`: at half the size a tiny network's came out at a cosine of .997, and no sooner.
"""

import logging
import operator
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pera_fast.config import Config
from pera_fast.data.ahead import map_ahead
from pera_fast.data.bands.sensor import band_plan, probe_settings, scaling_of
from pera_fast.data.decoding.dali import error_reason, require_dali
from pera_fast.data.files.manifest import Manifest
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.loading.decode_on import Decoding, plan
from pera_fast.data.loading.pipeline import CropPipeline
from pera_fast.data.loading.streams import own_stream, receive, ship, with_index
from pera_fast.data.reading.source import Image, SampleSource

_log = logging.getLogger("pera_fast")
_READ_AHEAD = 2  # batches that are read while others are decoded
_MADE_AHEAD = 2  # batches that wait to be taken
_MAX_SANDBOXES = 4
_DEPTH = 2  # batches that the pipeline has under way


@dataclass
class WholeBatch:
    """Images of some rows of a manifest."""

    rows: np.ndarray  # int64 [n]: rows of `manifest.readable`, rising, without those that cannot be used
    pixels: Tensor  # uint8 or uint16 [n, S, S, C]
    stop: int  # the row after the last one of the batch, left out or not


@dataclass
class _Pending:
    """A batch on its way."""

    rows: list[int]
    reading: "list[Future[Image | None]]"
    images: list[Image]
    crops: Tensor | None = None  # made already, image by image


class WholeImages:
    """Batches of a manifest's readable files, each resized to a square: bilinear with antialias.

    Args:
        cfg: read are model.in_chans and data: bands, bits and ranges, as of a run.
        manifest: of the folder.
        size: pixels S a side.
        batch_size: files of a batch; one of which files are left out has fewer images.
        device: where the batches go.
        skipped: where files that cannot be used are reported.
        decoding: where images are decoded, and by how many threads; None: see `decode_on.plan`.
    """

    decoding: Decoding

    def __init__(
        self,
        cfg: Config,
        manifest: Manifest,
        *,
        size: int,
        batch_size: int,
        device: torch.device,
        skipped: SkippedFiles,
        decoding: Decoding | None = None,
    ):
        require_dali()
        self._views = replace(cfg.views, num_global=1, num_local=0, global_size=size)
        self._channels, self._batch_size, self._count = cfg.model.in_chans, batch_size, len(manifest.readable)
        self._device = with_index(device)
        self.decoding = decoding or plan(replace(cfg, views=self._views), manifest, device)
        self._crops_on = self._device if self.decoding.on == "gpu" else torch.device("cpu")
        bands = band_plan(cfg, manifest)
        settings, scaling = probe_settings(cfg, bands), scaling_of(cfg, bands)
        self._raw = None if settings.encoded else scaling.depth
        self._source = SampleSource(
            manifest, settings, 0, skipped, min(self.decoding.threads, _MAX_SANDBOXES), scaling,
            timeout=cfg.data.storage_timeout, on_gpu=self._crops_on.type == "cuda",
        )  # fmt: skip
        self._to_read: Iterator[int] = iter(())  # first rows of the batches that are left
        self._readers: ThreadPoolExecutor | None = None
        self._reading: deque[_Pending] = deque()
        self._decoding: deque[_Pending] = deque()
        self._pipeline: CropPipeline | None = None
        self._stream: AbstractContextManager | None = None

    def batches(self, start: int = 0) -> Generator[WholeBatch, None, None]:
        """The batches in order; once for an object.

        Args:
            start: row at which to begin, a multiple of the batch size.

        Raises:
            MachineError: the storage did not answer in time.
        """
        firsts = range(start, self._count, self._batch_size)
        self._to_read = iter(firsts)
        self._readers = ThreadPoolExecutor(self.decoding.threads, thread_name_prefix="pera-read")
        try:
            work = map_ahead(self._make, firsts, 1, _MADE_AHEAD, "pera-batches", self._source.close)
            with closing(work):  # its thread ends before what it uses
                for made in work:
                    yield receive(made, self._device)
        finally:
            self._source.close()
            self._readers.shutdown(cancel_futures=True)
            self._pipeline = None

    # In the thread that makes batches

    def _make(self, first: int) -> Any:
        """The next batch, which begins with that row; the one after it is started first."""
        if self._stream is None:
            self._stream = own_stream(self._device)
        with self._stream:
            self._fill()
            pending = self._decoding[0]
            crops = self._collect() if pending.crops is None else pending.crops
            self._decoding.popleft()
            self._fill()
            stop = min(first + self._batch_size, self._count)
            return ship(WholeBatch(np.array(pending.rows, np.int64), crops, stop), self._device)

    def _fill(self) -> None:
        """Keep batches under way, in readers and in the pipeline."""
        while len(self._decoding) < _DEPTH:
            while len(self._reading) <= _READ_AHEAD and (first := next(self._to_read, None)) is not None:
                self._read(first)
            if not self._reading:
                return
            pending = self._reading.popleft()
            images = [future.result() for future in pending.reading]
            pending.rows = [row for row, image in zip(pending.rows, images, strict=True) if image is not None]
            pending.images, pending.reading = [image for image in images if image is not None], []
            self._decoding.append(pending)
            self._submit(pending)

    def _read(self, first: int) -> None:
        assert self._readers is not None
        rows = list(range(first, min(first + self._batch_size, self._count)))
        reading = [self._readers.submit(self._source.fetch_only, row) for row in rows]
        self._reading.append(_Pending(rows, reading, []))

    def _submit(self, pending: _Pending) -> None:
        if self._pipeline is None:  # the first call of a pipeline starts as many batches as it is deep
            left = 1 + len(self._reading) + operator.length_hint(self._to_read)
            self._pipeline = self._build(self._batch_size, min(_DEPTH, left))
        try:
            _start(self._pipeline, pending.images)
        except Exception as error:
            self._recover(error)

    def _collect(self) -> Tensor:
        assert self._pipeline is not None
        try:
            crops = self._pipeline.collect()[0]
        except Exception as error:
            self._recover(error)
            crops = self._decoding[0].crops
            assert crops is not None
        return crops[: len(self._decoding[0].images)]  # without the blank one

    def _build(self, batch_size: int, depth: int) -> CropPipeline:
        return CropPipeline(
            self._views, self._channels, batch_size, self.decoding.threads, self._crops_on, depth=depth,
            raw=self._raw, pinned=self._crops_on != self._device,
        )  # fmt: skip

    # When DALI fails on what had passed the check

    def _recover(self, error: Exception) -> None:
        """Makes the batches that are under way image by image, and leaves out those that fail alone."""
        _log.debug("the image pipeline failed and is built anew: %s", error)
        self._pipeline = None  # of no use any more
        blank = self._build(1, 1)
        try:
            blank.try_out()
        except Exception:  # the device's fault, not a file's
            raise error from None
        for pending in self._decoding:
            if pending.crops is None:
                made = [(row, self._alone(row, image)) for row, image in zip(pending.rows, pending.images, strict=True)]
                pending.rows = [row for row, crop in made if crop is not None]
                crops = [crop for _, crop in made if crop is not None]
                pending.crops = torch.cat(crops) if crops else self._nothing()

    def _alone(self, row: int, image: Image | None) -> Tensor | None:
        """One image's square [1, S, S, C], by another decoder where the pipeline's fails; None: by none."""
        while image is not None:
            single = self._build(1, 1)
            try:
                _start(single, [image])
                return single.collect()[0]
            except Exception as error:
                self._source.distrust(image, error_reason(error))
                image = self._source.fetch_only(row)
        return None

    def _nothing(self) -> Tensor:
        shape = (0, self._views.global_size, self._views.global_size, self._channels)
        return torch.empty(shape, dtype=torch.uint16 if self._raw == 16 else torch.uint8)


def _start(pipeline: CropPipeline, images: list[Image]) -> None:
    """Submit whole images, or a blank one where there are none."""
    if not images:
        pipeline.submit_blank()
        return
    ends = np.array([(image.height, image.width) for image in images], np.float32)[None]
    pipeline.submit([image.data for image in images], np.zeros_like(ends), ends)
