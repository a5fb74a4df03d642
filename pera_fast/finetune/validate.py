"""Measures a network on labelled images that it was not trained on."""

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from pera_fast.errors import UserError
from pera_fast.features.tiles import TileGrid, tiled
from pera_fast.finetune.data import LabelledData, WholeSample, ahead
from pera_fast.finetune.losses import predicted
from pera_fast.finetune.model import FineTuner
from pera_fast.finetune.scores import Counts, scores


@torch.no_grad()
def validate(model: FineTuner, data: LabelledData, batch_size: int, overlap: float) -> dict[str, float]:
    """Scores on whole images: scenes resized to the network's input, others tiled with overlap.

    Raises:
        UserError: none of the images can be read.
        MachineError: the storage did not answer in time.
    """
    plan, counts = model.plan, Counts(len(model.plan.classes))
    was = model.training
    model.eval()
    rows = iter(range(len(data)))
    read = 0
    try:
        wholes = (whole for whole in ahead(data.try_whole, rows, data.cfg, batch_size) if whole is not None)
        if plan.dense:
            for whole in wholes:
                read += 1
                for top, logits in logits_of(model, stacked(whole.images), batch_size, overlap):
                    counts.add(logits.argmax(0), whole.target[top : top + logits.shape[1]])
        else:
            while some := list(islice(wholes, batch_size)):
                read += len(some)
                _add_scenes(model, data, some, counts)
    finally:
        model.train(was)
    if not read:
        raise UserError(f"{data.samples.source}: none of the {len(data)} images to validate on can be read")
    return scores(counts, plan.task, plan.several)


def _add_scenes(model: FineTuner, data: LabelledData, some: list[WholeSample], counts: Counts) -> None:
    samples = [data.resized(whole) for whole in some]
    device = next(model.parameters()).device
    found = predicted(model(torch.stack([sample.images for sample in samples]).to(device)), model.plan.several)
    truth = torch.stack([sample.target for sample in samples])
    if model.plan.several:
        counts.add_several(found, truth)
    else:
        counts.add(found, truth)


def stacked(images: list[np.ndarray]) -> np.ndarray:
    """Images [H, W, C] of a sample as one [H, W, V * C]."""
    return images[0] if len(images) == 1 else np.concatenate(images, -1)


def logits_of(model: FineTuner, image: np.ndarray, batch_size: int, overlap: float) -> Iterator[tuple[int, Tensor]]:
    """Logits of an image of any size in memory, `stacked`; as `features.tiles.tiled` gives them."""
    size = model.plan.size
    grid = TileGrid(image.shape[0], image.shape[1], size, int(size * overlap))
    return tiled(grid, lambda tile: np.ascontiguousarray(grid.cut(image, tile)), tile_logits(model), batch_size)


def tile_logits(model: FineTuner) -> Callable[[Tensor], Tensor]:
    """A function from tiles [n, S, S, V * C] on the CPU to logits [n, K, S, S]."""
    device, views = next(model.parameters()).device, model.plan.views

    def run(tiles: Tensor) -> Tensor:
        count, size = tiles.shape[:2]
        images = tiles.to(device).view(count, size, size, views, -1).permute(0, 3, 1, 2, 4).contiguous()
        return model(images)

    return run
