"""`pixel_loss` and its gradient in vectorised PyTorch, a chunk of rows at a time: the target never exists whole."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pera_kernels.visible_patches import eager as pixels
from pera_kernels.visible_patches.arguments import Patches
from pera_kernels.visible_patches.reference import compute_dtype


def differences(pred: Tensor, patches: Patches) -> Iterator[tuple[slice, Tensor]]:
    """Chunk after chunk of rows: which rows, and their `pred - target` [r, P*P*C] in float32 (or float64)."""
    compute = compute_dtype(pred.dtype)
    patches = pixels.with_gray_mean(patches, compute)
    crop, patch = pixels.row_addresses(patches.index)
    step = pixels.chunk_length(pred.shape[1], pred.device)
    for start in range(0, len(patch), step):
        part = slice(start, start + step)
        target = pixels.patch_rows(patches, crop[part], patch[part], compute)
        yield part, pred[part].to(compute) - target.permute(0, 2, 3, 1).flatten(1)


def pixel_loss(pred: Tensor, patches: Patches) -> Tensor:
    """See `op.pixel_loss`."""
    total = torch.zeros((), dtype=compute_dtype(pred.dtype), device=pred.device)
    for _, difference in differences(pred, patches):
        total += difference.square().sum()
    return total / max(len(pred), 1)


def pixel_loss_backward(grad: Tensor, pred: Tensor, patches: Patches) -> Tensor:
    """Gradient for `pred` [R, P*P*C], of its dtype, given the loss's gradient `grad` []; recomputes the target."""
    result = torch.empty_like(pred, memory_format=torch.contiguous_format)
    scale = grad * (2 / max(len(pred), 1))
    for part, difference in differences(pred, patches):
        result[part] = difference * scale
    return result
