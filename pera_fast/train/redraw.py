"""Draws the crops, colours and masks of any sample in any epoch again, as training draws them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pera_fast.config import Config
from pera_fast.data.files.manifest import Manifest
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.loading.batch import Batch
from pera_fast.data.loading.decode_on import plan
from pera_fast.data.loading.producer import Failure, Producer
from pera_fast.data.sampling.order import SampleOrder
from pera_fast.model.inputs import StepInputs
from pera_fast.train.inputs import make_inputs


class _Fixed(SampleOrder):
    """The same samples of the same epoch, whatever the step."""

    def __init__(self, epoch: int, samples: Sequence[int]):
        self.batch_size = len(samples)
        self._at = epoch, np.array(samples, np.int64)

    def __call__(self, micro_step: int) -> tuple[int, np.ndarray]:
        return self._at


@dataclass
class Redrawn:
    """Some samples of one epoch."""

    batch: Batch  # crops and colours; its samples are those that stand in where a file cannot be read
    inputs: StepInputs  # the same with the patches that are seen; stochastic depth is not a sample's, but a step's


def redraw(cfg: Config, manifest: Manifest, epoch: int, samples: Sequence[int], skipped: SkippedFiles) -> Redrawn:
    """Draw some samples as the run of `cfg` on `manifest` does.

    Args:
        cfg: the run's configuration.
        manifest: the run's, which numbers the samples: row of `manifest.readable`.
        epoch: counted from 0.
        samples: one or more.
        skipped: where files that cannot be used are reported.

    Raises:
        UserError: no readable image is left.
    """
    cpu = torch.device("cpu")
    producer = Producer(
        cfg,
        manifest,
        _Fixed(epoch, samples),
        cpu,
        skipped,
        0,
        lambda batch: Redrawn(batch, make_inputs(batch, cfg)),
        plan(cfg, manifest, cpu),
    )
    try:
        made = producer.batches.get()
    finally:
        producer.close()
    if isinstance(made, Failure):
        raise made.error
    return made
