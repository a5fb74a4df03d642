"""The loader's threads: readers fetch bytes in order, one thread drives the pipeline and finishes batches."""

import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pera_fast.config import Config
from pera_fast.data.bands.sensor import band_plan, probe_settings, scaling_of
from pera_fast.data.decoding.dali import error_reason
from pera_fast.data.files.manifest import Manifest
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.loading.batch import Batch, ColorParams, CropGroup
from pera_fast.data.loading.decode_on import Decoding
from pera_fast.data.loading.pipeline import CropPipeline
from pera_fast.data.loading.streams import own_stream, ship
from pera_fast.data.reading.reduced import ReducedDecoder
from pera_fast.data.reading.source import Image, SampleSource
from pera_fast.data.sampling.order import SampleOrder
from pera_fast.data.sampling.views import draw_colors, draw_windows

_log = logging.getLogger("pera_fast")
_READ_AHEAD = 2  # batches that are read while others are decoded
_MAX_SANDBOXES = 4
_RECOVERIES = 3  # for one batch: a substitute may fail as well


@dataclass
class Failure:
    """Stands in the queue for a batch that could not be made."""

    error: BaseException


@dataclass
class _Pending:
    """A micro-batch on its way."""

    micro_step: int
    epoch: int
    wanted: list[int]  # samples of the order
    reading: "list[Future[Image]]"
    images: list[Image]

    @property
    def samples(self) -> np.ndarray:
        return np.array([image.sample for image in self.images], dtype=np.int64)


class Producer:
    """Fills `batches` until it is closed or fails. Arguments as of `loader.Loader`."""

    def __init__(
        self,
        cfg: Config,
        manifest: Manifest,
        order: SampleOrder,
        device: torch.device,
        skipped: SkippedFiles,
        start_micro_step: int,
        transform: Callable[[Batch], Any] | None,
        decoding: Decoding,
    ):
        self._views, self._seed, self._channels = cfg.views, cfg.train.seed, cfg.model.in_chans
        self._threads = decoding.threads
        self._order, self._device, self._transform = order, device, transform
        self._crops_on = device if decoding.on == "gpu" else torch.device("cpu")
        self._next_step = start_micro_step
        plan = band_plan(cfg, manifest)
        settings, scaling = probe_settings(cfg, plan), scaling_of(cfg, plan)
        self._raw = None if settings.encoded else scaling.depth
        self._has_colors = cfg.has_colors()
        sandboxes = min(self._threads, _MAX_SANDBOXES)
        reduced = None
        if settings.encoded and self._crops_on.type == "cpu" and cfg.data.reduced_decoding is not None:
            reduced = ReducedDecoder(self._views, self._seed, self._channels, cfg.data.reduced_decoding)
        self._source = SampleSource(
            manifest, settings, self._seed, skipped, sandboxes, scaling, reduced, cfg.data.storage_timeout,
            on_gpu=self._crops_on.type == "cuda",
        )  # fmt: skip
        self.storage = self._source.storage
        self._readers = ThreadPoolExecutor(self._threads, thread_name_prefix="pera-read")
        self._reading: deque[_Pending] = deque()
        self._decoding: deque[_Pending] = deque()
        self._pipeline: CropPipeline | None = None
        self._stopped = threading.Event()
        self.batches: queue.Queue[Any] = queue.Queue(maxsize=cfg.data.prefetch)
        self._thread = threading.Thread(target=self._run, name="pera-batches", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops everything; returns when the threads have ended."""
        self._stopped.set()
        self._source.close()
        self._readers.shutdown(wait=False, cancel_futures=True)
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):  # it may wait for a place
                self.batches.get_nowait()
            self._thread.join(timeout=0.02)
        self._readers.shutdown()

    def _run(self) -> None:
        try:
            with own_stream(self._device):
                self._pipeline = self._build()
                while not self._stopped.is_set():
                    self._put(self._make())
        except BaseException as error:  # must come out of the consumer's next(), whatever it is
            if not self._stopped.is_set():
                self._put(Failure(error))
        finally:
            self._pipeline = None
            self._decoding.clear()

    def _put(self, item: Any) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self.batches.put(item, timeout=0.1)
                return

    def _build(self, batch_size: int | None = None, depth: int = 2) -> CropPipeline:
        return CropPipeline(
            self._views,
            self._channels,
            batch_size or self._order.batch_size,
            self._threads,
            self._crops_on,
            depth=depth,
            raw=self._raw,
            pinned=self._crops_on != self._device,
        )

    def _make(self) -> Any:
        """The next batch. The one after it is started first, so that DALI works while this one is finished."""
        self._fill()
        crops = self._collect()
        pending = self._decoding.popleft()
        self._fill()
        batch = self._finish(pending, *crops)
        return ship(batch if self._transform is None else self._transform(batch), self._device)

    # Reading and decoding ahead

    def _fill(self) -> None:
        assert self._pipeline is not None
        while len(self._decoding) < self._pipeline.depth:
            while len(self._reading) <= _READ_AHEAD:
                self._read()
            pending = self._reading.popleft()
            pending.images = [future.result() for future in pending.reading]
            pending.reading = []
            self._decoding.append(pending)
            try:
                self._submit(self._pipeline, pending)
            except Exception as error:
                self._recover(error)

    def _read(self) -> None:
        epoch, samples = self._order(self._next_step)
        wanted = [int(sample) for sample in samples]
        reading = [self._readers.submit(self._source.fetch, epoch, sample) for sample in wanted]
        self._reading.append(_Pending(self._next_step, epoch, wanted, reading, []))
        self._next_step += 1

    def _submit(self, pipeline: CropPipeline, pending: _Pending) -> None:
        sizes = np.array([(image.height, image.width) for image in pending.images])
        windows = draw_windows(self._views, self._seed, pending.epoch, pending.samples, sizes)
        factors = np.array([image.factor for image in pending.images], np.float32)[:, None]
        shifts = np.array([image.shift for image in pending.images], np.float32)
        start, end = (corner / factors + shifts for corner in windows.roi())
        pipeline.submit([image.data for image in pending.images], start, end)

    def _collect(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._pipeline is not None
        for _ in range(_RECOVERIES):
            try:
                return self._pipeline.collect()
            except Exception as error:
                self._recover(error)
        return self._pipeline.collect()

    # When DALI fails on what had passed the check

    def _recover(self, error: Exception) -> None:
        """Finds the files that fail alone, puts others in their place and starts the batches again."""
        _log.debug("the image pipeline failed and is built anew: %s", error)
        found, single = False, None
        for pending in self._decoding:
            for slot, image in enumerate(pending.images):
                single = single or self._build(batch_size=1, depth=1)
                told = self._fails_alone(single, pending, slot)
                if told is None:
                    continue
                single = None  # a pipeline that raised is of no use any more
                if not found and self._fails_on_any_image():  # the device's fault, not the file's
                    raise error
                found = True
                self._source.distrust(image, told)
                pending.images[slot] = self._source.fetch(pending.epoch, pending.wanted[slot])
        if not found:
            raise error
        self._pipeline = self._build()
        for pending in self._decoding:
            self._submit(self._pipeline, pending)

    def _fails_alone(self, single: CropPipeline, pending: _Pending, slot: int) -> str | None:
        try:
            self._submit(single, _Pending(0, pending.epoch, [], [], [pending.images[slot]]))
            single.collect()
        except Exception as error:
            return error_reason(error)
        return None

    def _fails_on_any_image(self) -> bool:
        try:
            self._build(batch_size=1, depth=1).try_out()
        except Exception as error:
            _log.debug("the image pipeline fails on a blank image too: %s", error)
            return True
        return False

    # Finishing

    def _finish(self, pending: _Pending, global_: torch.Tensor, local: torch.Tensor) -> Batch:
        student, teacher = draw_colors(self._views, self._seed, pending.epoch, pending.samples, self._has_colors)
        split = self._views.num_global

        def group(pixels: torch.Tensor, crops: slice) -> CropGroup:
            return CropGroup(pixels, _color_params(student, crops), _color_params(teacher, crops))

        return Batch(
            pending.micro_step,
            pending.epoch,
            pending.samples,
            group(global_, slice(0, split)),
            group(local, slice(split, None)),
        )


def _color_params(ops: tuple[np.ndarray, np.ndarray], crops: slice) -> ColorParams:
    order, factors = (torch.from_numpy(np.ascontiguousarray(values[crops]).reshape(-1, 4)) for values in ops)
    return ColorParams(order, factors)
