"""Features of a frozen backbone, which sees every patch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pera_kernels.visible_patches import visible_patches

from .transformer import VisionTransformer


@torch.inference_mode()
def features(
    backbone: VisionTransformer,
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    batch_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Dense features after the final norm.

    Args:
        backbone: in any mode; there is no dropout in it.
        images: uint8 or uint16 [N, H, W, C] of any number of channels (scaled to [0, 1] and normalised here), or float
            [N, C, H, W], normalised already. H = W, a multiple of the patch size; positions are interpolated if it is
            not the training size.
        mean, std: per channel, of values in [0, 1].
        dtype: of activations and matrix products.
        batch_size: images at a time.

    Returns:
        cls [N, D] and patches [N, L, D], L in raster order, in dtype.
    """
    parts = [_features(backbone, chunk, mean, std, dtype) for chunk in images.split(batch_size)]
    return torch.cat([cls for cls, _ in parts]), torch.cat([patches for _, patches in parts])


def _features(
    backbone: VisionTransformer, images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    grid = images.shape[2] // backbone.patch_size  # a side, in both layouts
    count = images.shape[0]
    index = torch.arange(grid * grid, dtype=torch.int32, device=images.device).expand(count, -1).contiguous()
    rows = visible_patches(images, index, None, None, None, list(mean), list(std), backbone.patch_size, dtype)
    tokens = backbone.embed([rows], [index], [grid])
    tokens = backbone.forward_blocks(tokens, [count, 1 + grid * grid])
    tokens = backbone.final_norm(tokens).view(count, 1 + grid * grid, -1)
    return tokens[:, 0], tokens[:, 1:]
