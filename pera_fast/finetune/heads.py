"""Heads of a fine-tuning: classes of scenes, and classes of each pixel of an image or of a pair."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.init import trunc_normal_, zeros_

from pera_fast.finetune.pyramid import ConvBlock, SimpleFeaturePyramid, as_map

_POOL_SIZES = (1, 2, 3, 6)  # of the pyramid pooling of UPerNet


def _initialised(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """Small weights: a head begins with logits near zero."""
    trunc_normal_(layer.weight, std=0.01)
    if layer.bias is not None:
        zeros_(layer.bias)
    return layer


class SceneHead(nn.Module):
    """Logits of scenes from cls token, mean of the patches, or both.

    Args:
        inputs: width D of the backbone.
        classes: logits K.
        pooling: cls, mean or both.
        hidden: width of a hidden layer; None: linear.
    """

    def __init__(self, inputs: int, classes: int, pooling: str = "both", hidden: int | None = None):
        super().__init__()
        self.pooling = pooling
        channels = inputs * (2 if pooling == "both" else 1)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.hidden = nn.Sequential(nn.Linear(channels, hidden), nn.GELU()) if hidden else nn.Identity()
        self.out = _initialised(nn.Linear(hidden or channels, classes))

    def forward(self, cls: Tensor, patches: Tensor) -> Tensor:
        """cls [N, D], patches [N, L, D] -> logits [N, K]."""
        parts = [] if self.pooling == "mean" else [cls]
        if self.pooling != "cls":
            parts.append(patches.mean(1))
        return self.out(self.hidden(self.norm(torch.cat(parts, 1))))


class FpnDecoder(nn.Module):
    """Sum of the levels at the finest stride: each through a convolution of its own, then enlarged."""

    def __init__(self, width: int, levels: int = 4):
        super().__init__()
        self.levels = nn.ModuleList(ConvBlock(width, width) for _ in range(levels))

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps [N, width, ...], the finest first -> [N, width, h, w] of the finest."""
        size = maps[0].shape[2:]
        found = [level(one) for level, one in zip(self.levels, maps, strict=True)]
        return sum((_enlarged(one, size) for one in found[1:]), found[0])


class UperDecoder(nn.Module):
    """A light UPerNet: pyramid pooling of the coarsest level, a way from coarse to fine, all levels concatenated.

    Xiao et al. 2018, arXiv 1807.10221.
    """

    def __init__(self, width: int, levels: int = 4):
        super().__init__()
        self.pools = nn.ModuleList(ConvBlock(width, width // 4 or 1, 1) for _ in _POOL_SIZES)
        self.pooled = ConvBlock(width + len(_POOL_SIZES) * (width // 4 or 1), width)
        self.levels = nn.ModuleList(ConvBlock(width, width) for _ in range(levels - 1))
        self.fuse = ConvBlock(levels * width, width)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps [N, width, ...], the finest first -> [N, width, h, w] of the finest."""
        top = maps[-1]
        pools = [
            _enlarged(pool(_pooled(top, size)), top.shape[2:])
            for pool, size in zip(self.pools, _POOL_SIZES, strict=True)
        ]
        ways = [self.pooled(torch.cat([top, *pools], 1))]
        for one in reversed(maps[:-1]):
            ways.insert(0, one + _enlarged(ways[0], one.shape[2:]))
        found = [level(way) for level, way in zip(self.levels, ways[:-1], strict=True)] + ways[-1:]
        size = found[0].shape[2:]
        return self.fuse(torch.cat([_enlarged(one, size) for one in found], 1))


class DenseHead(nn.Module):
    """Logits of every pixel: a feature pyramid, a decoder, a 1x1 convolution, enlarged to the image's size.

    Args:
        inputs: channels of the features, see `change_channels` for pairs.
        classes: logits K.
        decoder: fpn or uper.
        width: channels of pyramid and decoder.
    """

    def __init__(self, inputs: int, classes: int, decoder: str = "fpn", width: int = 256):
        super().__init__()
        self.pyramid = SimpleFeaturePyramid(inputs, width)
        self.decoder = FpnDecoder(width) if decoder == "fpn" else UperDecoder(width)
        self.out = _initialised(nn.Conv2d(width, classes, 1))

    def forward(self, patches: Tensor, grid: int, size: int) -> Tensor:
        """Patches [N, grid * grid, inputs] in raster order -> logits [N, K, size, size]."""
        return _enlarged(self.out(self.decoder(self.pyramid(as_map(patches, grid, grid)))), (size, size))


def change_channels(width: int, features: str) -> int:
    """Channels of `change_features` for a backbone of this width."""
    return width if features == "difference" else 3 * width


def change_features(before: Tensor, after: Tensor, features: str) -> Tensor:
    """Features of pairs: |before - after| (`difference`), or before, after and that (`all`), along the last axis."""
    difference = (before - after).abs()
    return difference if features == "difference" else torch.cat([before, after, difference], -1)


def _enlarged(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    if x.shape[2:] == torch.Size(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def _pooled(x: Tensor, size: int) -> Tensor:
    """Means over a grid of at most size x size cells."""
    return F.adaptive_avg_pool2d(x, (min(size, x.shape[2]), min(size, x.shape[3])))
