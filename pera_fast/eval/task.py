"""The protocol between an evaluation and its tasks: options, parts of the samples, and a result.

A task is a module of this package with one function, `begin(parts, extractor, options) -> Probe`. It computes the
features of one network once. The probe that it returns is called once for each share of the labels.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from pera_fast.errors import UserError
from pera_fast.features.extract import POOLINGS
from pera_fast.features.masks import Masks, masks_of
from pera_fast.features.samples import Samples
from pera_fast.keyed import Purpose, generator
from pera_fast.page import Section

HEADS = ("linear", "conv")  # for masks
TEST_SHARE, VAL_SHARE = 0.2, 0.2  # of samples without splits; of labelled samples without a validation part


@dataclass(frozen=True)
class Options:
    """Options of an evaluation that a task reads.

    Attributes:
        device: of the network; probes may use it too.
        poolings: of `POOLINGS`, in order; for scenes.
        seed: of every draw.
        progress: show progress bars, on a terminal.
        size: pixels a side of the network's input, for masks; None: by the images' size.
        head: of `HEADS`, for masks.
        layers: blocks whose features a head for masks sees, evenly spread; at most all.
        classes: names of the classes 0, 1, ... of masks; empty: those of the training masks, by number.
        ignore: value of masks whose pixels count for nothing.
        folds: of a cross-validation over all samples with masks; 0: the data's own splits.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    poolings: tuple[str, ...] = POOLINGS
    seed: int = 0
    progress: bool = True
    size: int | None = None
    head: str = "linear"
    layers: int = 4
    classes: tuple[str, ...] = ()
    ignore: int | None = None
    folds: int = 0


@dataclass(frozen=True)
class Rows:
    """Labelled samples of one share, as row numbers of `Parts.labelled`, rising.

    Attributes:
        fit: int64 [n], to fit on while settings are chosen; at least one.
        val: int64 [m], to choose settings on. Empty where there is too little: then nothing can be chosen.
    """

    fit: np.ndarray
    val: np.ndarray

    @property
    def all(self) -> np.ndarray:
        """int64 [n + m], to fit on once the settings are chosen."""
        return np.sort(np.concatenate([self.fit, self.val]))


@dataclass(frozen=True)
class Parts:
    """Samples divided into those to learn from and those to measure on.

    Attributes:
        labelled: samples of `train`, then of `val` where somebody gave that split.
        test: samples of `test`.
        train_count: leading samples of `labelled` that are of `train`; all of them where nobody gave `val`.
        seed: of the draws of `rows`.
        masks: how the samples' masks are read; None: they have none.
    """

    labelled: Samples
    test: Samples
    train_count: int
    seed: int = 0
    masks: Masks | None = None

    def rows(self, share: float) -> Rows:
        """The labelled samples of a share, drawn by seed: a smaller share's samples are among a larger one's.

        Of scenes with one label each, that share of every class; of other samples, that share of all. A validation part
        that was given is drawn from alike. Else a fifth of what was drawn is held out for it.

        Args:
            share: of the labels, in (0, 1].
        """
        count = len(self.labelled)
        if self.train_count < count:
            train, val = np.arange(self.train_count), np.arange(self.train_count, count)
            return Rows(self._drawn(train, share, 1), self._drawn(val, share, 1))
        drawn = self._drawn(np.arange(count), share, 2)
        fit, val = self._held_out(drawn)
        return Rows(fit, val)

    def _drawn(self, rows: np.ndarray, share: float, least: int) -> np.ndarray:
        """A share of some rows; at least `least` of every class, or as many as it has."""
        chosen = [
            self._shuffled(group, key)[: max(round(len(group) * share), least)] for key, group in self._groups(rows)
        ]
        drawn = set(np.concatenate(chosen).tolist())
        if self.labelled.several:
            drawn |= self._of_rare_classes(rows, drawn, least)
        return np.array(sorted(drawn), dtype=np.int64)

    def _held_out(self, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        fit, val = [], []
        for key, group in self._groups(drawn):
            mixed = self._shuffled(group, key)
            count = min(max(round(len(group) * VAL_SHARE), 1), len(group) - 1)
            val.append(mixed[:count])
            fit.append(mixed[count:])
        return np.sort(np.concatenate(fit)), np.sort(np.concatenate(val))

    def _groups(self, rows: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Rows by class, each with a key for its draws; all in one group where they have masks or several labels."""
        if not self.labelled.labels or self.labelled.several:
            return [(0, rows)]
        classes = np.array([labels[0] for labels in self.labelled.labels])[rows]
        return [(1 + int(label), rows[classes == label]) for label in np.unique(classes)]

    def _shuffled(self, rows: np.ndarray, key: int) -> np.ndarray:
        """The rows by a random rank of their own, which does not depend on which others there are."""
        ranks = generator(self.seed, Purpose.LABELS, key).random(len(self.labelled))
        return rows[np.argsort(ranks[rows], kind="stable")]

    def _of_rare_classes(self, rows: np.ndarray, drawn: set[int], least: int) -> set[int]:
        """Further rows, so that each class that has them is among the labels `least` times."""
        added: set[int] = set()
        for label in range(len(self.labelled.classes)):
            having = [row for row in self._shuffled(rows, 0).tolist() if label in self.labelled.labels[row]]
            lacking = least - len([row for row in having if row in drawn | added])
            added |= set([row for row in having if row not in drawn | added][: max(lacking, 0)])
        return added


@dataclass(frozen=True)
class TaskResult:
    """Results of one network at one share of the labels.

    Attributes:
        headline: name of the metric that networks are compared by.
        metrics: name -> value, a share in [0, 1], more is better.
        columns: names of the metrics in the table over networks, in order; the headline first.
        intervals: name -> bounds of the 95 % interval, of metrics that have one.
        sections: of the report; shown for the largest share of the labels.
        notes: a line each, for the terminal and the report.
        details: further values for the JSON file, which its encoder takes.
        classes: names of the classes, where the samples do not have them.
    """

    headline: str
    metrics: dict[str, float]
    columns: tuple[str, ...] = ()
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()


Probe = Callable[[float], TaskResult]


def parts_of(samples: Samples, seed: int = 0) -> Parts:
    """The samples by their splits; where nobody gave splits, a fifth of them, drawn by seed, is the test part.

    Raises:
        UserError: a split is empty that an evaluation needs.
    """
    if not any(samples.splits):
        train, test = samples.divided(TEST_SHARE, seed)
        if not len(train) or not len(test):
            raise UserError(f"{samples.source}: {len(samples)} sample(s) are too few to divide into training and test")
        return Parts(train, test, len(train), seed)
    train, test = samples.need("train"), samples.need("test")
    order = [row for split in ("train", "val") for row, name in enumerate(samples.splits) if name == split]
    return Parts(samples.take(order), test, len(train), seed)


def with_masks(samples: Samples, options: Options) -> Parts:
    """Samples of segmentation or change in their parts, after a look at every mask.

    With folds all samples are labelled, whatever their splits.

    Raises:
        UserError: a mask cannot be read or has wrong values, a split is empty, there are more folds than samples, or
            changes have not two classes.
    """
    folds = options.folds
    if folds and not 2 <= folds <= len(samples):
        raise UserError(f"--folds {folds}: wants 2 to {len(samples)}, the number of samples")
    given = (
        parts_of(samples, options.seed) if not folds else Parts(samples, samples.take([]), len(samples), options.seed)
    )
    masks = masks_of(given.labelled, given.test, options.ignore, options.classes)
    if samples.task == "change" and len(masks.classes) != 2:
        raise UserError(
            f"{samples.source}: its masks have {len(masks.classes)} classes ({', '.join(masks.classes[:6])}); --task"
            " change wants two: 0 unchanged, 1 changed; leave another value out with --ignore"
        )
    if samples.task == "change" and not options.classes:
        masks = replace(masks, classes=("unchanged", "changed"))
    return replace(given, masks=masks)
