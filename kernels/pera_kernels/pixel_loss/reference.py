"""Definition of `pixel_loss` in plain PyTorch. Source: docs/method.md sections 4.7 and 5.4."""

from collections.abc import Sequence

from torch import Tensor

from pera_kernels.visible_patches import reference as patches


def target_rows(rows: Tensor, channels: int) -> Tensor:
    """Elements of patch rows [R, C*P*P] from order (channel, row, column) to (row, column, channel)."""
    return rows.unflatten(1, (channels, -1)).transpose(1, 2).flatten(1)


def difference(
    pred: Tensor,  # [N*n, P*P*C]
    crops: Tensor,  # uint8 or uint16 [N, H, W, C], or float [N, C, H, W]
    index: Tensor,  # [N, n]
    order: Tensor | None,
    factors: Tensor | None,
    gray_mean: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int,
    rgb: Sequence[int] | None = None,
) -> Tensor:
    """`pred - target` [N*n, P*P*C], in float64 for float64 `pred`, float32 otherwise."""
    compute = patches.compute_dtype(pred.dtype)
    channels = crops.shape[3 if patches.is_raw(crops) else 1]
    rows = patches.visible_patches(crops, index, order, factors, gray_mean, mean, std, patch_size, compute, rgb)
    return pred.to(compute) - target_rows(rows, channels)


def pixel_loss(pred: Tensor, *where: object, rgb: Sequence[int] | None = None) -> Tensor:
    """Squared error summed over a patch's values, mean over all rows; 0 if there are none. See `op.pixel_loss`.

    Differentiable for `pred`; `where` are the other arguments, as `difference` has them.
    """
    return difference(pred, *where, rgb=rgb).square().sum() / max(len(pred), 1)  # type: ignore[arg-type]


def pixel_loss_backward(grad: Tensor, pred: Tensor, *where: object, rgb: Sequence[int] | None = None) -> Tensor:
    """Gradient for `pred` [N*n, P*P*C], of its dtype, given the loss's gradient `grad` []."""
    return (grad * 2 * difference(pred, *where, rgb=rgb) / max(len(pred), 1)).to(pred.dtype)  # type: ignore[arg-type]
