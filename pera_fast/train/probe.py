"""Probes the teacher during pretraining: kNN on labelled images, between two steps."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pera_fast.config import Config
from pera_fast.errors import UserError
from pera_fast.features.extract import Extractor
from pera_fast.features.knn import knn_accuracy
from pera_fast.features.samples import Samples, read_samples
from pera_fast.model.export import export_teacher
from pera_fast.model.pera import PerA
from pera_fast.weights.backbone import Backbone
from pera_fast.weights.files import load_safetensors

log = logging.getLogger(__name__)

KEY = "probe_knn"  # in metrics.jsonl, in the lines of the steps that were probed
HELD_OUT = 0.2  # of the images, where there is no split `val`
_SHARE = 0.01  # of the time that probes may take
_BATCH = 32  # images at a time: little memory beside the step's


@dataclass(frozen=True)
class _Part:
    """Images that are held in memory, and their classes."""

    images: Tensor  # uint8 or uint16 [N, S, S, C]
    labels: Tensor  # int64 [N]


def labelled(cfg: Config) -> tuple[Samples, Samples] | None:
    """Labelled images to learn from and to test on, as `eval.data` names them; None: it names none.

    The test images are those of split `val`. Without `val` a fifth of the training images is held out: the best teacher
    is chosen by this number, so the split `test` is left alone.

    Raises:
        UserError: they cannot be used.
    """
    if cfg.eval.data is None:
        return None
    samples, most, seed = read_samples("scene", cfg.eval.data, cfg.eval.root), cfg.eval.images, cfg.train.seed
    if samples.several:
        raise UserError(f"eval.data={samples.source}: has scenes of several labels; the probe wants one each")
    if not any(samples.splits):
        parts = samples.divided(HELD_OUT, seed)
    elif len(samples.part("val")):
        parts = samples.need("train"), samples.part("val")
    else:
        parts = samples.need("train").divided(HELD_OUT, seed)
    return _some(parts[0], most, seed), _some(parts[1], most, seed)


class Probe:
    """kNN of the teacher (k = 20, cosine, temperature .07; its cls token) on labelled images.

    It draws nothing from the run's random numbers and changes no weight: a run with probes has the bits of one without.

    Args:
        cfg: read are `eval`, `train.seed`, `train.precision`, `model` and `data`.
        pera: the model of the run, on its device.
        parts: images to learn from and to test on, see `labelled`.
        best: file for the teacher with the highest accuracy so far; what it holds already counts.

    Raises:
        UserError: an image cannot be read, or has other bands than the run.
    """

    def __init__(self, cfg: Config, pera: PerA, parts: tuple[Samples, Samples], best: Path):
        self._cfg, self._pera, self._path = cfg, pera, best
        device = pera.center.device
        backbone = Backbone(pera.teacher.backbone, cfg, "teacher")
        self._extractor = Extractor(backbone, device, cfg.eval.size, cfg.train.precision, _BATCH)
        self._parts = [self._read(part) for part in parts]
        self.best = _known_best(best)
        self.last: float | None = None  # accuracy
        self._cost = self._ended = 0.0  # seconds of the last probe, and when it ended
        sizes = [len(part.labels) for part in self._parts]
        memory = sum(part.images.nbytes for part in self._parts) / 2**20
        log.info(
            "probe: kNN on %d images of %s, learnt from %d of %d classes, %s; %.0f MiB",
            sizes[1], cfg.eval.data, sizes[0], len(parts[0].classes), _interval(cfg.eval.every), memory,
        )  # fmt: skip

    def is_due(self, step: int) -> bool:
        """Whether to probe after so many steps."""
        if self._cfg.eval.every is not None:
            return step % self._cfg.eval.every == 0
        return _SHARE * (time.monotonic() - self._ended) >= self._cost

    def begin(self) -> None:
        """Probe the teacher as it is before the first step, for comparison, and say what it costs."""
        began = self._measure()
        log.info("probe: kNN %.1f%% before the first step (%.1f s)", 100 * (self.last or 0.0), began)

    def run(self, step: int) -> float:
        """Accuracy of the teacher after so many steps; keeps the teacher if it is the best."""
        self._measure()
        assert self.last is not None
        if self.best is None or self.last > self.best:
            try:
                export_teacher(self._pera, self._path, {"step": step, KEY: self.last})
            except OSError as error:
                log.warning("%s: could not be written (%s)", self._path, error.strerror or error)
            else:
                self.best = self.last
        return self.last

    def _measure(self) -> float:
        """Set `last`, and return the seconds that it took."""
        began = time.monotonic()
        learnt, tested = (self._features(part.images) for part in self._parts)
        self.last = knn_accuracy(learnt, self._parts[0].labels, tested, self._parts[1].labels)
        self._ended = time.monotonic()
        self._cost = self._ended - began
        return self._cost

    def _features(self, images: Tensor) -> Tensor:
        parts = [self._extractor.tokens(batch)[0][0].float().cpu() for batch in images.split(_BATCH)]
        return torch.cat(parts)

    def _read(self, samples: Samples) -> _Part:
        images = list(self._extractor.batches([paths[0] for paths in samples.images]))
        return _Part(torch.cat(images), torch.tensor([labels[0] for labels in samples.labels]))


def _some(samples: Samples, most: int, seed: int) -> Samples:
    """At most so many samples, drawn by the seed."""
    if len(samples) <= most:
        return samples
    drawn = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed % 2**63))[:most]
    return samples.take(sorted(drawn.tolist()))


def _known_best(path: Path) -> float | None:
    """Accuracy of the best teacher that an earlier process of the run kept."""
    if not path.exists():
        return None
    try:
        accuracy = load_safetensors(path)[1].get(KEY)
    except UserError:  # damaged: the next probe replaces it
        return None
    return accuracy if isinstance(accuracy, float) else None


def _interval(every: int | None) -> str:
    if every is None:
        return f"as often as takes under {_SHARE:.0%} of the time"
    return f"every {every} steps"
