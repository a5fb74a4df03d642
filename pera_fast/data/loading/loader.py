"""The loader: endless micro-batches of one rank, read, decoded and cropped ahead of the training step."""

import contextlib
import queue
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch

from pera_fast.config import Config
from pera_fast.data.decoding.dali import require_dali
from pera_fast.data.files.manifest import Manifest
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.loading.batch import Batch
from pera_fast.data.loading.decode_on import Decoding, plan
from pera_fast.data.loading.producer import Failure, Producer
from pera_fast.data.loading.streams import receive, with_index
from pera_fast.data.sampling.order import SampleOrder
from pera_fast.storage import MachineError

T = TypeVar("T")
_LOOK_SECONDS = 0.5  # between two looks whether the run is asked to stop, while it waits for a batch


class Loader(Iterator[T], Generic[T]):
    """Iterates over micro-batches, for ever. What comes is a pure function of seed, files and micro-step.

    Args:
        cfg: the configuration; read are views, model.in_chans, train.seed and data.
        manifest: of the data folder; the same for all ranks.
        batch_size: images of one micro-batch of one rank.
        accumulate: micro-batches of one optimiser step.
        rank: of this process.
        world_size: number of ranks.
        device: where the batches go.
        skipped: where files that cannot be used are reported; rank 0 enters those of the index too.
        start_micro_step: position in the run at which to start.
        transform: applied to each batch in the loader's thread; its result is what `next` gives. Where the batch goes
            to a GPU, this is before: its crops are where they were made, everything else is on the CPU.
        decoding: where images are decoded, and by how many threads; None: see `decode_on.plan`.
        asked_to_stop: looked at while the storage is away; if it says so, `next` raises MachineError.

    Raises:
        UserError: too few images, or DALI is not installed. From `next`: no readable image is left, or (MachineError)
            the storage did not answer in time. Whatever a thread or `transform` raises comes out of `next`, then and
            ever after.
    """

    steps_per_epoch: int  # optimiser steps
    wait_seconds: float  # time that the last `next` blocked
    decoding: Decoding

    def __init__(
        self,
        cfg: Config,
        manifest: Manifest,
        *,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device,
        skipped: SkippedFiles,
        start_micro_step: int = 0,
        transform: Callable[[Batch], T] | None = None,
        decoding: Decoding | None = None,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ):
        require_dali()
        order = SampleOrder(
            len(manifest.readable),
            seed=cfg.train.seed,
            batch_size=batch_size,
            accumulate=accumulate,
            rank=rank,
            world_size=world_size,
        )
        self.steps_per_epoch = order.steps_per_epoch
        self.wait_seconds = 0.0
        if rank == 0:
            for path, reason in manifest.unreadable():
                skipped.add(path, reason)
        self._failure: BaseException | None = None
        self._device, self._asked_to_stop = with_index(device), asked_to_stop
        self.decoding = decoding or plan(cfg, manifest, device, ranks=world_size)
        self._producer = Producer(
            cfg, manifest, order, self._device, skipped, start_micro_step, transform, self.decoding
        )
        # The threads know the producer only, so a loader that is forgotten is collected and ends them.
        self._finalizer = weakref.finalize(self, self._producer.close)

    def __iter__(self) -> "Loader[T]":
        return self

    def __next__(self) -> T:
        if self._failure is not None:
            raise self._failure
        if not self._finalizer.alive:
            raise RuntimeError("the loader is closed")
        start = time.perf_counter()
        item = self._wait()
        self.wait_seconds = time.perf_counter() - start
        if isinstance(item, Failure):
            self._failure = item.error
            raise item.error
        return receive(item, self._device)

    def _wait(self) -> Any:
        while True:
            with contextlib.suppress(queue.Empty):
                return self._producer.batches.get(timeout=_LOOK_SECONDS)
            if self._producer.storage.away and self._asked_to_stop():
                raise MachineError("stopped while the storage did not answer")

    def close(self) -> None:
        """Stops the threads and processes; takes as long as one batch at most."""
        self._finalizer()

    def __enter__(self) -> "Loader[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
