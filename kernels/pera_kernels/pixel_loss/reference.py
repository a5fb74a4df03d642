"""Definition of `pixel_loss` in plain PyTorch. Source: docs/method.md sections 4.7 and 5.4."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pera_kernels.visible_patches.arguments import Patches
from pera_kernels.visible_patches.reference import compute_dtype, is_raw, visible_patches


def target_rows(rows: Tensor, channels: int) -> Tensor:
    """Elements of patch rows [R, C*P*P] from order (channel, row, column) to (row, column, channel)."""
    return rows.unflatten(1, (channels, -1)).transpose(1, 2).flatten(1)


def difference(pred: Tensor, patches: Patches) -> Tensor:
    """`pred - target` [N*n, P*P*C], in float64 for float64 `pred`, float32 otherwise."""
    compute = compute_dtype(pred.dtype)
    channels = patches.crops.shape[3 if is_raw(patches.crops) else 1]
    rows = visible_patches(*patches[:-1], compute, patches.rgb)
    return pred.to(compute) - target_rows(rows, channels)


def pixel_loss(pred: Tensor, *where: Any, rgb: Sequence[int] | None = None) -> Tensor:
    """Squared error summed over a patch's values, mean over all rows; 0 if there are none. See `op.pixel_loss`.

    Differentiable for `pred`; `where` are the op's other arguments, in order.
    """
    return difference(pred, Patches(*where, rgb=rgb)).square().sum() / max(len(pred), 1)


def pixel_loss_backward(grad: Tensor, pred: Tensor, *where: Any, rgb: Sequence[int] | None = None) -> Tensor:
    """Gradient for `pred` [N*n, P*P*C], of its dtype, given the loss's gradient `grad` []."""
    return (grad * 2 * difference(pred, Patches(*where, rgb=rgb)) / max(len(pred), 1)).to(pred.dtype)
