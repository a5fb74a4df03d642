"""Runs a frozen backbone on whole images, of which it sees every patch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pera_fast.model.transformer import VisionTransformer
from pera_kernels.visible_patches import visible_patches


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


@torch.inference_mode()
def layer_features(
    backbone: VisionTransformer,
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    layers: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> list[tuple[Tensor, Tensor]]:
    """Features after several blocks, each normalised by the final norm.

    Args:
        layers: blocks, counted from 0, or from the end as -1; rising.
        backbone, images, mean, std, dtype: as of `features`; all images at a time.

    Returns:
        For each layer cls [N, D] and patches [N, L, D].
    """
    tokens, groups = embed_images(backbone, images, mean, std, dtype)
    depth, found, start = len(backbone.blocks), [], 0
    for layer in layers:
        stop = layer % depth + 1
        # Blocks overwrite the stream where no gradient is recorded, and what was normalised is a tensor of its own.
        tokens = backbone.forward_blocks(tokens, groups, start, stop)
        start = stop
        normed = backbone.final_norm(tokens).view(groups[0], groups[1], -1)
        found.append((normed[:, 0], normed[:, 1:]))
    return found


def _features(
    backbone: VisionTransformer, images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    tokens, groups = embed_images(backbone, images, mean, std, dtype)
    tokens = backbone.final_norm(backbone.forward_blocks(tokens, groups)).view(groups[0], groups[1], -1)
    return tokens[:, 0], tokens[:, 1:]


def embed_images(
    backbone: VisionTransformer, images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, list[int]]:
    """Packed tokens of whole images, and their groups: N sequences of 1 + L tokens. Records gradients where wanted."""
    grid = images.shape[2] // backbone.patch_size  # a side, in both layouts
    count = images.shape[0]
    index = torch.arange(grid * grid, dtype=torch.int32, device=images.device).expand(count, -1).contiguous()
    rows = visible_patches(images, index, None, None, None, list(mean), list(std), backbone.patch_size, dtype)
    return backbone.embed([rows], [index], [grid]), [count, 1 + grid * grid]
