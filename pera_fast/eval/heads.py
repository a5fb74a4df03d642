"""Heads that predict a class for each patch of frozen features, and their training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pera_fast.features.masks import IGNORED

HIDDEN = 256  # channels of the convolutional head
_WARMUP = 0.05  # of the steps, in which the learning rate rises


@dataclass(frozen=True)
class Schedule:
    """Training of a head: AdamW, a short warm-up, then a cosine down to 0.

    Attributes:
        epochs: passes over the training tiles, at least.
        steps: updates, at least; more epochs are made of few tiles.
        lr: learning rate.
        weight_decay: of the convolutions' weights.
        batch_size: tiles a step.
    """

    epochs: int
    steps: int
    lr: float
    weight_decay: float
    batch_size: int = 8


# Chosen on 16 road tiles and 15 pairs of training parts (tiny recipe after 20 epochs). Change overfits soon.
SCHEDULES = {
    ("segmentation", "linear"): Schedule(epochs=10, steps=300, lr=1e-2, weight_decay=1e-4),
    ("segmentation", "conv"): Schedule(epochs=10, steps=300, lr=1e-3, weight_decay=1e-2),
    ("change", "linear"): Schedule(epochs=5, steps=60, lr=1e-3, weight_decay=1e-2),
    ("change", "conv"): Schedule(epochs=5, steps=60, lr=1e-3, weight_decay=1e-2),
}


def new_head(kind: str, width: int, classes: int, seed: int, hidden: int = HIDDEN) -> nn.Sequential:
    """A head with initial weights drawn by seed.

    Args:
        kind: `linear`: BatchNorm and a 1x1 convolution; `conv`: BatchNorm, a 1x1 convolution to `hidden` channels, two
            3x3 convolutions with BatchNorm, and a 1x1 convolution.
        width: channels of the features.
        classes: channels K of the logits.
        seed: of the weights.
        hidden: channels between.

    Returns:
        [N, width, h, w] -> logits [N, K, h, w].
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if kind == "linear":
            return nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, classes, 1))
        layers: list[nn.Module] = [nn.BatchNorm2d(width), nn.Conv2d(width, hidden, 1), nn.GELU()]
        for _ in range(2):
            layers += [nn.Conv2d(hidden, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden), nn.GELU()]
        return nn.Sequential(*layers, nn.Conv2d(hidden, classes, 1))


def upsample(logits: Tensor, size: int) -> Tensor:
    """Logits [N, K, h, w] at the pixels of their tiles [N, K, size, size], bilinear."""
    return F.interpolate(logits, (size, size), mode="bilinear", align_corners=False)


def train_head(
    head: nn.Module,
    batch: Callable[[Sequence[int]], tuple[Tensor, Tensor]],
    order: Callable[[np.random.Generator], list[int]],
    schedule: Schedule,
    seed: int,
    advance: Callable[[float], None] = lambda step: None,
) -> None:
    """Trains a head by cross-entropy at the pixels of the masks; it is in evaluation mode afterwards.

    Args:
        head: from `new_head`, on the device of the batches.
        batch: gives features [n, width, h, w] and class numbers int64 [n, S, S] of some tiles.
        order: gives the numbers of the training tiles, mixed by the generator.
        schedule: of the updates.
        seed: of the order.
        advance: told of each step.
    """
    rng = np.random.default_rng(seed)
    decayed = [weight for weight in head.parameters() if weight.ndim > 1]
    plain = [weight for weight in head.parameters() if weight.ndim == 1]
    groups = [{"params": decayed, "weight_decay": schedule.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=schedule.lr)
    numbers = order(rng)
    total = planned_steps(len(numbers), schedule)
    head.train()
    for step in range(total):
        if len(numbers) < schedule.batch_size:
            numbers += order(rng)
        some, numbers = numbers[: schedule.batch_size], numbers[schedule.batch_size :]
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr * _share_of_lr(step, total)
        features, target = batch(some)
        logits = upsample(head(features), target.shape[-1])
        # The mean over the labelled pixels; a sum over none of them, divided by one, is a gradient of zeros.
        loss = F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum")
        loss = loss / (target != IGNORED).sum().clamp(min=1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        advance(1)
    head.eval()


def planned_steps(tiles: int, schedule: Schedule) -> int:
    """Updates of a training on a number of tiles."""
    return max(schedule.steps, -(-tiles * schedule.epochs // schedule.batch_size))


def _share_of_lr(step: int, total: int) -> float:
    warmup = max(round(_WARMUP * total), 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + float(np.cos(np.pi * (step - warmup) / max(total - warmup, 1))))
