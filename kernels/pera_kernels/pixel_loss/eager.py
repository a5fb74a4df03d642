"""`pixel_loss` and its gradient in vectorised PyTorch, a chunk of rows at a time: the target never exists whole."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pera_kernels.visible_patches import eager as patches
from pera_kernels.visible_patches.reference import compute_dtype


def differences(
    pred: Tensor,
    crops: Tensor,
    index: Tensor,
    order: Tensor | None,
    factors: Tensor | None,
    gray_mean: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int,
    rgb: Sequence[int] | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Chunk after chunk of rows: which rows, and their `pred - target` [r, P*P*C] in float32 (or float64)."""
    compute = compute_dtype(pred.dtype)
    if order is not None and factors is not None and gray_mean is None:
        gray_mean = patches.contrast_mean(crops, order, factors, compute, rgb)
    crop, patch = patches.row_addresses(index)
    step = patches.chunk_length(pred.shape[1], pred.device)
    for start in range(0, len(patch), step):
        part = slice(start, start + step)
        target = patches.patch_rows(
            crops, crop[part], patch[part], order, factors, gray_mean, mean, std, patch_size, compute, rgb
        )
        yield part, pred[part].to(compute) - target.permute(0, 2, 3, 1).flatten(1)


def pixel_loss(pred: Tensor, *where: object, rgb: Sequence[int] | None = None) -> Tensor:
    """See `op.pixel_loss`; `where` are its other arguments, in order."""
    total = torch.zeros((), dtype=compute_dtype(pred.dtype), device=pred.device)
    for _, difference in differences(pred, *where, rgb=rgb):  # type: ignore[arg-type]
        total += difference.square().sum()
    return total / max(len(pred), 1)


def pixel_loss_backward(grad: Tensor, pred: Tensor, *where: object, rgb: Sequence[int] | None = None) -> Tensor:
    """Gradient for `pred` [R, P*P*C], of its dtype, given the loss's gradient `grad` []; recomputes the target."""
    result = torch.empty_like(pred, memory_format=torch.contiguous_format)
    scale = grad * (2 / max(len(pred), 1))
    for part, difference in differences(pred, *where, rgb=rgb):  # type: ignore[arg-type]
        result[part] = difference * scale
    return result
