"""Steps that segmentation and change share: sizes, tiles, folds, fitted heads, and logits of whole images."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pera_fast.eval import pixels
from pera_fast.eval.heads import HIDDEN, SCHEDULES, Schedule, new_head, planned_steps, train_head, upsample
from pera_fast.eval.pieces import Pieces
from pera_fast.eval.task import Options, Parts
from pera_fast.features.extract import Extractor
from pera_fast.features.samples import Samples
from pera_fast.features.tiles import blend
from pera_fast.progress import progress_bar

Decide = Callable[[Tensor], Tensor]
EXAMPLES = 4  # test samples with a picture
MOST_TIMES_TRAINED = 2  # the default size is at most so many times that of the training's crops


@dataclass(frozen=True)
class Split:
    """Samples of one fold, as row numbers of `Dense.samples`.

    Attributes:
        fit, val: to learn from; settings are chosen on `val`, which may be empty.
        test: to measure on.
    """

    fit: list[int]
    val: list[int]
    test: list[int]

    @property
    def labelled(self) -> list[int]:
        """All samples to learn from."""
        return sorted([*self.fit, *self.val])


@dataclass(frozen=True)
class Dense:
    """A network's features of all samples of a task with masks.

    Attributes:
        parts: labelled and test samples.
        pieces: of the labelled samples, then of the test samples.
        options: of the evaluation.
        notes: a line each.
    """

    parts: Parts
    pieces: Pieces
    options: Options
    notes: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.pieces.masks.classes

    @property
    def rgb(self) -> list[int] | None:
        """Channels that are red, green and blue, as the configuration of the weights names them."""
        return self.pieces.extractor.backbone.cfg.rgb_channels() or None

    @property
    def schedule(self) -> Schedule:
        """Training of a head."""
        return SCHEDULES[self.pieces.samples.task, self.options.head]

    @property
    def details(self) -> dict[str, Any]:
        """Settings for the JSON file."""
        pieces = self.pieces
        return {
            "size": pieces.size,
            "tiles": sum(len(grid) for grid in pieces.grids),
            "layers": list(pieces.layers),
            "head": self.options.head,
            "schedule": asdict(self.schedule),
        }

    def splits(self, share: float) -> list[Split]:
        """One split, that of the data; or with folds, one of each fold over all samples.

        With folds a fold's other samples are learned from, or a share of them: a smaller share's samples are among a
        larger one's. A fifth of them is the validation part.
        """
        count = len(self.parts.labelled)
        if not self.options.folds:
            rows = self.parts.rows(share)
            return [Split(rows.fit.tolist(), rows.val.tolist(), list(range(count, len(self.pieces.samples))))]
        mixed = np.random.default_rng(self.options.seed).permutation(len(self.pieces.samples)).tolist()
        found = []
        for fold in range(self.options.folds):
            test = mixed[fold :: self.options.folds]
            others = [row for row in mixed if row not in set(test)]
            others = others[: max(round(share * len(others)), 1)]
            held = round(len(others) / 5) if len(others) > 1 else 0
            found.append(Split(others[held:], others[:held], sorted(test)))
        return found

    def fit(self, rows: Sequence[int], seed: int, progress: str = "head") -> nn.Module:
        """A head that learned from some samples."""
        pieces, schedule = self.pieces, self.schedule
        hidden = min(HIDDEN, pieces.extractor.backbone.width)  # a small network's features need no wider head
        head = new_head(self.options.head, pieces.width, len(self.classes), seed, hidden).to(pieces.device)
        steps = planned_steps(len(pieces.order(rows, np.random.default_rng(0))), schedule)
        with progress_bar(progress, steps, wanted=self.options.progress) as advance:
            train_head(head, pieces.batch, lambda rng: pieces.order(rows, rng), schedule, seed, advance)
        return head

    def logits(self, head: nn.Module, rows: Sequence[int]) -> Iterator[tuple[int, Tensor, np.ndarray]]:
        """Logits of some samples at their masks' pixels, in rows as they are finished, from top to bottom.

        Yields:
            sample, logits float32 [K, h, W] on the device, and the mask of these rows int16 [h, W].
        """
        for row, mask, batches in self.pieces.scenes(rows):
            for top, found in blend(self.pieces.grids[row], _tile_logits(head, batches, self.pieces.size)):
                yield row, found, mask[top : top + found.shape[1]]

    def measure(self, head: nn.Module, rows: Sequence[int], decide: Decide, drawn: Collection[int]) -> "Measured":
        """Confusion matrices of some samples, and predicted masks of those that are drawn.

        Args:
            head: from `fit`.
            rows: samples.
            decide: logits [K, h, W] -> class numbers [h, W].
            drawn: samples for pictures.
        """
        count = len(self.classes)
        tables = {row: np.zeros((count, count), np.int64) for row in rows}
        masks: dict[int, list[np.ndarray]] = {row: [] for row in rows if row in drawn}
        for row, logits, truth in self.logits(head, rows):
            predicted = decide(logits)
            tables[row] += pixels.confusion(truth, predicted, count)
            if row in masks:
                masks[row].append(predicted.cpu().numpy())
        return Measured(tables, {row: np.concatenate(parts) for row, parts in masks.items()})


@dataclass(frozen=True)
class Measured:
    """Predictions of some samples.

    Attributes:
        tables: of each sample the pixels by true and predicted class, int64 [K, K].
        masks: predicted class numbers [H, W] of the samples that are drawn.
    """

    tables: dict[int, np.ndarray]
    masks: dict[int, np.ndarray]


def joined_measures(found: Sequence[Measured]) -> Measured:
    """Predictions of several folds, by sample in order."""
    tables = {row: table for one in found for row, table in one.tables.items()}
    masks = {row: mask for one in found for row, mask in one.masks.items()}
    return Measured(dict(sorted(tables.items())), dict(sorted(masks.items())))


def examples(splits: Sequence[Split], most: int = EXAMPLES) -> list[int]:
    """A few test samples for pictures, evenly spread."""
    rows = sorted(row for split in splits for row in split.test)
    places = np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)
    return [rows[place] for place in places]


@torch.inference_mode()
def _of_batch(head: nn.Module, features: Tensor, size: int) -> Tensor:
    return upsample(head(features), size)


def _tile_logits(head: nn.Module, batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    for features in batches:
        yield from _of_batch(head, features, size)


def prepare(parts: Parts, extractor: Extractor, options: Options) -> Dense:
    """Read all images and masks, and extract the features of one network.

    Args:
        parts: from `task.with_masks`.
        extractor: of the network, of any size.
        options: of the evaluation.

    Raises:
        UserError: an image cannot be read, or its mask has another size.
    """
    together, masks = joined(parts.labelled, parts.test), parts.masks
    assert masks is not None
    notes = list(masks.notes)
    patch, trained = extractor.backbone.cfg.model.patch_size, extractor.backbone.cfg.views.global_size
    height, width = extractor.read(together.images[0][0]).shape[:2]
    size = options.size
    if size is None:
        size = network_size(max(height, width), patch, trained)
        notes.append(
            f"the network sees tiles of {size} px (--size), for images of {width} x {height} px and weights trained at"
            f" {trained} px"
        )
    extractor = extractor.at(size)
    layers = spread_layers(len(extractor.backbone.model.blocks), options.layers)
    overlap = size // 4
    pieces = Pieces(together, masks, extractor, layers, overlap, options.progress)
    return Dense(parts, pieces, options, tuple(notes))


def network_size(side: int, patch: int, trained: int, most: float = MOST_TIMES_TRAINED) -> int:
    """Pixels a side of the network's input for images of a size, in whole patches.

    An image of at most `most` times the training's size is one tile. Larger ones are cut into as few tiles a side as
    this limit allows with an overlap of a quarter, and these are made no larger than they must be.

    Args:
        side: of the images, the longer one, in pixels.
        patch: pixels a side of a patch.
        trained: size of the training's global crops.
        most: times that size.
    """
    limit = max(int(most * trained) // patch, 1) * patch
    if side <= limit:
        return -(-side // patch) * patch
    tiles = 2
    while (needed := _needed(side, tiles, patch)) > limit:
        tiles += 1
    return needed


def _needed(side: int, tiles: int, patch: int) -> int:
    """The smallest size in whole patches of which so many tiles a side, overlapping by a quarter, cover an image."""
    return -(-side * 4 // (patch * (3 * tiles + 1))) * patch


def spread_layers(depth: int, count: int) -> list[int]:
    """Numbers of `count` blocks, evenly spread, the last among them; all of them if there are fewer."""
    count = min(count, depth)
    return [round((place + 1) * depth / count) - 1 for place in range(count)]


def joined(first: Samples, second: Samples) -> Samples:
    """Samples of two parts of one data set, one behind the other."""
    return Samples(
        first.task,
        first.images + second.images,
        first.labels + second.labels,
        first.masks + second.masks,
        first.splits + second.splits,
        first.classes,
        first.source,
    )
