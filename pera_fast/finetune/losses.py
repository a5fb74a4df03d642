"""Losses of a fine-tuning, in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pera_fast.features.masks import IGNORED


def scene_loss(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross entropy of logits [B, K] with class numbers int64 [B]; with several labels float [B, K], binary for each.

    Args:
        smoothing: share of the probability that goes to all classes alike; for one label each.
    """
    if targets.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits.float(), targets)
    return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)


def mask_loss(logits: Tensor, targets: Tensor, smoothing: float = 0.0, dice: float = 0.0) -> Tensor:
    """Mean cross entropy over pixels that count, and `dice` times the Dice loss; 0 where none counts.

    Args:
        logits: [B, K, S, S].
        targets: int64 [B, S, S], classes or `IGNORED`.
        smoothing: as of `scene_loss`.
        dice: weight of one minus the Dice coefficient, a mean over the classes that the batch has.
    """
    logits, counted = logits.float(), targets != IGNORED
    number = counted.sum().clamp(min=1)
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, label_smoothing=smoothing, reduction="sum") / number
    if not dice:
        return loss
    wanted = F.one_hot(targets.clamp(min=0), logits.shape[1]).permute(0, 3, 1, 2) * counted[:, None]
    found = logits.softmax(1) * counted[:, None]
    axes = (0, 2, 3)
    pixels = wanted.sum(axes)
    overlap = (2 * (found * wanted).sum(axes) + 1) / (found.sum(axes) + pixels + 1)
    present = (pixels > 0).float()
    return loss + dice * ((1 - overlap) * present).sum() / present.sum().clamp(min=1)


def loss_of(logits: Tensor, targets: Tensor, smoothing: float, dice: float) -> Tensor:
    """The loss for logits of scenes [B, K] or of masks [B, K, S, S]."""
    if logits.ndim == 2:
        return scene_loss(logits, targets, smoothing)
    return mask_loss(logits, targets, smoothing, dice)


def predicted(logits: Tensor, several: bool) -> Tensor:
    """Class numbers of logits [B, K, ...], int64 [B, ...]; with several labels bool [B, K], those above one half."""
    return logits > 0 if several else torch.argmax(logits, 1)
