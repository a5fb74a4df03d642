"""Reads labelled images for a fine-tuning: keyed crops, flips and turns in training, whole images in validation."""

import hashlib
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from pera_fast.config import Config
from pera_fast.config.finetune import input_size
from pera_fast.cores import usable_cores
from pera_fast.data.ahead import map_ahead
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.errors import UserError
from pera_fast.features.images import ImageReader, resize
from pera_fast.features.masks import IGNORED, Masks
from pera_fast.features.samples import Samples
from pera_fast.keyed import Purpose, generator
from pera_fast.storage import MachineError

Item = TypeVar("Item")
Result = TypeVar("Result")
_TRIES = 16  # samples that may stand in for one that cannot be read
_ASPECT = 4 / 3  # of a scene's crop, at most

_LOOKED_AT = 8  # samples, before something is taken to be the matter with all of them


class Sample(NamedTuple):
    """One sample as the network takes it.

    Attributes:
        images: uint8 or uint16 [V, S, S, C].
        target: int64 [], or float32 [K] of several labels, or int64 [S, S].
    """

    images: Tensor
    target: Tensor


class WholeSample(NamedTuple):
    """One sample as it is stored.

    Attributes:
        images: uint8 or uint16 [H, W, C] each.
        target: as of `Sample`, of a mask int64 [H, W].
    """

    images: list[np.ndarray]
    target: Tensor


class LabelledData:
    """Samples of one part of a data set.

    Args:
        cfg: read are the bands and ranges, finetune, views.hflip, views.vflip, train.seed.
        samples: the part.
        classes: number K of classes.
        several: whether scenes have several labels.
        masks: how masks are read; None for scenes.
        skipped: where samples that cannot be read are entered.
    """

    def __init__(
        self,
        cfg: Config,
        samples: Samples,
        classes: int,
        several: bool,
        masks: Masks | None,
        skipped: SkippedFiles,
    ):
        self.cfg, self.samples, self.masks, self._skipped = cfg, samples, masks, skipped
        self._classes, self._several = classes, several
        self.size = input_size(cfg)
        self._read = ImageReader(cfg)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def crops(self) -> int:
        """Training samples of an epoch."""
        return len(self) * (1 if self.masks is None else self.cfg.finetune.crops)

    def whole(self, row: int) -> WholeSample:
        """A sample as it is stored.

        Raises:
            UserError: it cannot be read, or sizes within it differ.
            MachineError: the storage did not answer in time.
        """
        paths = self.samples.images[row]
        images = [self._read(path) for path in paths]
        shape = images[0].shape[:2]
        for path, image in zip(paths, images, strict=True):
            if image.shape[:2] != shape:
                told = f"{image.shape[1]} x {image.shape[0]} px, {paths[0]} is {shape[1]} x {shape[0]} px"
                raise UserError(f"{path}: is {told}; the images of a pair are of one size")
        if self.masks is None:
            return WholeSample(images, self._labels(row))
        mask = self.masks.read(self.samples.masks[row], shape, paths[0])
        return WholeSample(images, torch.from_numpy(mask.astype(np.int64)))

    def check_some(self) -> None:
        """Look at some samples before a run begins.

        Raises:
            UserError: none of them can be used, so that something is the matter with all: other bands than the weights
                are of, masks of another size than their images.
            MachineError: the storage did not answer in time.
        """
        first, rows = None, range(min(len(self), _LOOKED_AT))
        for row in rows:
            try:
                self.whole(row)
                return
            except MachineError:
                raise
            except UserError as error:
                first = first or error
        raise UserError(f"{first}; none of the first {len(rows)} sample(s) of {self.samples.source} can be used")

    def _labels(self, row: int) -> Tensor:
        labels = self.samples.labels[row]
        if not self._several:
            return torch.tensor(labels[0])
        return torch.zeros(self._classes).index_fill_(0, torch.tensor(labels), 1.0)

    def try_whole(self, row: int) -> WholeSample | None:
        """The sample, or None if it cannot be read, which is then entered in the list of skipped files."""
        try:
            return self.whole(row)
        except MachineError:
            raise
        except UserError as error:
            path = self.samples.images[row][0]
            self._skipped.add(path, str(error).removeprefix(f"{path}: "))
            return None

    def training(self, epoch: int, crop: int) -> Sample:
        """A sample of an epoch, 0 <= crop < `crops`; one that cannot be read is replaced by another, drawn by its key.

        Raises:
            UserError: many in a row cannot be read.
            MachineError: the storage did not answer in time.
        """
        rng = generator(self.cfg.train.seed, Purpose.AUGMENT, epoch, crop)
        others = generator(self.cfg.train.seed, Purpose.SUBSTITUTE, epoch, crop)
        row = crop % len(self)
        found, first = self.try_whole(row), row
        for _ in range(_TRIES):
            if found is not None:
                break
            row = int(others.integers(len(self)))
            found = self.try_whole(row)
        if found is None:
            raise UserError(
                f"{self.samples.images[first][0]} and {_TRIES} others drawn for it cannot be read; see"
                f" {self._skipped.path}"
            )
        return self._augmented(found, rng)

    def resized(self, whole: WholeSample) -> Sample:
        """A scene at the network's size, without any change."""
        return Sample(torch.stack([resize(image, self.size) for image in whole.images]), whole.target)

    def _augmented(self, whole: WholeSample, rng: np.random.Generator) -> Sample:
        views, f = self.cfg.views, self.cfg.finetune
        height, width = whole.images[0].shape[:2]
        mask = whole.target.numpy() if whole.target.ndim == 2 else None
        if mask is None:
            top, left, high, wide = _scene_window(rng, height, width, f.crop_scale)
            cut = [resize(image[top : top + high, left : left + wide], self.size).numpy() for image in whole.images]
        else:
            top, left = (int(rng.integers(max(length - self.size, 0) + 1)) for length in (height, width))
            cut = [_tile(image, top, left, self.size) for image in whole.images]
            mask = _tile(mask, top, left, self.size, IGNORED)
        flips = rng.random(2) < (views.hflip, views.vflip)
        turns = int(rng.integers(4)) if f.rotate else 0
        turned = [_turned(image, flips, turns) for image in cut]
        target = whole.target if mask is None else torch.from_numpy(_turned(mask, flips, turns))
        return Sample(torch.stack([torch.from_numpy(image) for image in turned]), target)

    def digest(self) -> str:
        """Digest of the samples' names and labels in order: runs with equal digests number their samples alike."""
        told = hashlib.sha256()
        for row in range(len(self)):
            labels = self.samples.labels[row] if self.samples.labels else self.samples.masks[row].name
            told.update(f"{[path.name for path in self.samples.images[row]]} {labels}\n".encode("utf-8", "replace"))
        return told.hexdigest()


def _scene_window(rng: np.random.Generator, height: int, width: int, scale: list[float]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop of this share of the area; the whole image where that is all."""
    if scale[0] == 1:
        return 0, 0, height, width
    area = rng.uniform(scale[0], scale[1]) * height * width
    aspect = math.exp(rng.uniform(-math.log(_ASPECT), math.log(_ASPECT)))
    high, wide = (min(max(round(math.sqrt(area * f)), 1), most) for f, most in ((1 / aspect, height), (aspect, width)))
    top, left = int(rng.integers(height - high + 1)), int(rng.integers(width - wide + 1))
    return top, left, high, wide


def _tile(image: np.ndarray, top: int, left: int, size: int, fill: int | None = None) -> np.ndarray:
    """[size, size, ...] from there on; beyond the image it is reflected, or filled."""
    part = image[top : top + size, left : left + size]
    beyond = [(0, size - part.shape[0]), (0, size - part.shape[1]), *[(0, 0)] * (part.ndim - 2)]
    if not any(after for _, after in beyond):
        return part
    return np.pad(part, beyond, mode="reflect") if fill is None else np.pad(part, beyond, constant_values=fill)


def _turned(image: np.ndarray, flips: np.ndarray, turns: int) -> np.ndarray:
    """An image or mask flipped (horizontally, vertically) and turned by quarters; a copy."""
    if flips[0]:
        image = image[:, ::-1]
    if flips[1]:
        image = image[::-1]
    return np.array(np.rot90(image, turns), order="C")


@dataclass(frozen=True)
class Length:
    """Micro-batches of a training.

    Attributes:
        batch: samples of a micro-batch.
        accumulate: micro-batches of a step.
        steps_per_epoch: optimiser steps of a pass; what is left of the samples is left out.
    """

    batch: int
    accumulate: int
    steps_per_epoch: int

    @property
    def total(self) -> int:
        """Samples of a step."""
        return self.batch * self.accumulate


def length_of(cfg: Config, samples: int) -> Length:
    """Micro-batches for so many samples: fewer samples than a step takes make smaller steps."""
    batch, accumulate = cfg.train.batch_size or 1, cfg.train.accumulate or 1
    batch = min(batch, samples)
    accumulate = min(accumulate, samples // batch)
    return Length(batch, accumulate, samples // (batch * accumulate))


class Batch(NamedTuple):
    """A micro-batch: images uint8 or uint16 [B, V, S, S, C], targets [B, ...] as of `Sample`."""

    images: Tensor
    targets: Tensor


def micro_batches(data: LabelledData, length: Length, start: int, end: int) -> Generator[Batch, None, None]:
    """Micro-batches from one number to another, read ahead in threads; the order of an epoch is drawn by its number."""
    seed, per_epoch = data.cfg.train.seed, length.steps_per_epoch * length.accumulate

    @lru_cache(maxsize=4)
    def order(epoch: int) -> np.ndarray:
        return generator(seed, Purpose.SHUFFLE, epoch).permutation(data.crops)

    def rows() -> Iterator[tuple[int, int]]:
        for micro in range(start, end):
            epoch, place = divmod(micro, per_epoch)
            for row in order(epoch)[place * length.batch : (place + 1) * length.batch]:
                yield epoch, int(row)

    found: list[Sample] = []
    for sample in ahead(lambda key: data.training(*key), rows(), data.cfg, length.batch):
        found.append(sample)
        if len(found) == length.batch:
            yield Batch(torch.stack([one.images for one in found]), torch.stack([one.target for one in found]))
            found.clear()


def ahead(function: Callable[[Item], Result], items: Iterator[Item], cfg: Config, batch: int) -> Iterator[Result]:
    """`map_ahead` with the threads and the batches ahead that a configuration asks for."""
    threads = cfg.data.loader_threads or max(1, int(usable_cores()))
    return map_ahead(function, items, threads, max(1, -(-cfg.data.prefetch * batch // threads)), "pera-read")
