"""Tiles of labelled images with their frozen patch features, which are kept in memory as far as they fit."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pera_fast.errors import UserError
from pera_fast.features.extract import Extractor, ahead
from pera_fast.features.masks import IGNORED, Masks
from pera_fast.features.samples import Samples
from pera_fast.features.tiles import Tile, TileGrid
from pera_fast.progress import progress_bar

_SHARE_OF_MEMORY = 0.4  # of what is free: features of tiles


@dataclass(frozen=True)
class _Scene:
    """Pixels of a sample, each [H, W, C], and its mask int16 [H, W]."""

    pixels: tuple[np.ndarray, ...]
    mask: np.ndarray


class Pieces:
    """Tiles of samples, numbered through all samples in order.

    Features of a tile are those of several layers, one behind the other: [L * D, g, g]. Of two images they are the
    absolute difference. They are kept as fp16 on the CPU; the samples that do not fit are read and extracted again
    each time.

    Args:
        samples: of segmentation or change.
        masks: how their masks are read.
        extractor: its size is that of a tile.
        layers: blocks after which features are taken, rising.
        overlap: pixels that neighbouring tiles share at least.
        progress: show a progress bar, on a terminal.
        memory: bytes for features and masks. None: a share of what is free.

    Raises:
        UserError: an image or a mask cannot be read, or they differ in size.
    """

    def __init__(
        self,
        samples: Samples,
        masks: Masks,
        extractor: Extractor,
        layers: Sequence[int],
        overlap: int,
        progress: bool = True,
        memory: int | None = None,
    ):
        self.samples, self.masks, self.extractor, self.layers = samples, masks, extractor, tuple(layers)
        self.size, self.device = extractor.size, extractor.device
        self.grids: list[TileGrid] = []
        self._kept: list[tuple[Tensor, np.ndarray]] = []  # of the first samples: features of the tiles, mask
        left = _free_memory() * _SHARE_OF_MEMORY if memory is None else memory
        with progress_bar("features", len(samples), wanted=progress) as advance:
            for scene in ahead(self._read, range(len(samples)), 8):
                height, width = scene.mask.shape
                self.grids.append(TileGrid(height, width, self.size, overlap))
                grid_bytes = 2 * self.width * (self.size // self._patch) ** 2
                left -= len(self.grids[-1]) * grid_bytes + scene.mask.nbytes
                if left >= 0:
                    self._kept.append((self._features_of(len(self.grids) - 1, scene), scene.mask))
                advance(1)
        starts = np.cumsum([0, *map(len, self.grids)])
        self.numbers = [range(int(a), int(b)) for a, b in pairwise(starts)]
        self._sample = np.repeat(np.arange(len(samples)), [len(grid) for grid in self.grids])

    @property
    def width(self) -> int:
        """Channels of the features."""
        return len(self.layers) * self.extractor.backbone.width

    @property
    def _patch(self) -> int:
        return self.extractor.backbone.cfg.model.patch_size

    @property
    def all_kept(self) -> bool:
        """Whether all features are in memory."""
        return len(self._kept) == len(self.samples)

    def order(self, rows: Sequence[int], rng: np.random.Generator) -> list[int]:
        """Numbers of all tiles of some samples, mixed. Where not all are kept, a sample's tiles stay together."""
        groups = [list(self.numbers[row]) for row in rng.permutation(np.asarray(rows))]
        mixed = [number for group in groups for number in rng.permutation(group).tolist()]
        return rng.permutation(mixed).tolist() if self.all_kept else mixed

    def batch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Features float32 [n, L * D, g, g] and classes int64 [n, S, S] of tiles, `IGNORED` beyond the image."""
        features, targets = [], []
        scenes: dict[int, _Scene] = {}
        for number in numbers:
            row = int(self._sample[number])
            place = number - self.numbers[row].start
            grid, tile = self.grids[row], self.grids[row][place]
            if row < len(self._kept):
                found, mask = self._kept[row][0][place], self._kept[row][1]
            else:
                if row not in scenes:
                    scenes[row] = self._read(row)
                found, mask = self._run(grid, [tile], scenes[row])[0], scenes[row].mask
            features.append(found)
            targets.append(_cut_mask(mask, tile, self.size))
        stacked = torch.stack(features).to(self.device, non_blocking=True).float()
        return stacked, torch.from_numpy(np.stack(targets)).to(self.device, torch.int64)

    def scenes(self, rows: Sequence[int]) -> Iterator[tuple[int, np.ndarray, Iterable[Tensor]]]:
        """For each of some samples its number, its mask int16 [H, W], and its tiles' features in batches.

        Batches are float32 [n, L * D, g, g] on the device, in the order of the sample's grid.
        """
        for row in rows:
            if row < len(self._kept):
                features, mask = self._kept[row]
                batches = (part.to(self.device).float() for part in features.split(self._batch_size))
                yield row, mask, batches
            else:
                scene = self._read(row)
                yield row, scene.mask, (part.float() for part in self._batches(row, scene))

    def images(self, row: int) -> tuple[np.ndarray, ...]:
        """Pixels of a sample's images, each [H, W, C]."""
        return tuple(self.extractor.read(path) for path in self.samples.images[row])

    def _read(self, row: int) -> _Scene:
        paths = self.samples.images[row]
        pixels = self.images(row)
        shape = pixels[0].shape[:2]
        for path, other in zip(paths[1:], pixels[1:], strict=True):
            if other.shape[:2] != shape:
                raise UserError(
                    f"{path}: is {other.shape[1]} x {other.shape[0]} px, and {paths[0]}, of the same place before, is"
                    f" {shape[1]} x {shape[0]} px; both must lie on the same pixels"
                )
        return _Scene(pixels, self.masks.read(self.samples.masks[row], shape, paths[0]))

    @property
    def _batch_size(self) -> int:
        """Tiles at a time: as many pixels as in a batch of images of the training size."""
        trained = self.extractor.backbone.cfg.views.global_size
        return max(round(self.extractor.batch_size * (trained / self.size) ** 2), 1)

    def _features_of(self, row: int, scene: _Scene) -> Tensor:
        """fp16 [tiles, L * D, g, g] on the CPU."""
        return torch.cat([part.half().cpu() for part in self._batches(row, scene)])

    def _batches(self, row: int, scene: _Scene) -> Iterator[Tensor]:
        tiles = list(self.grids[row])
        for start in range(0, len(tiles), self._batch_size):
            yield self._run(self.grids[row], tiles[start : start + self._batch_size], scene)

    def _run(self, grid: TileGrid, tiles: Sequence[Tile], scene: _Scene) -> Tensor:
        """Features [n, L * D, g, g] of tiles of a sample, on the device."""
        found = [self._layers(np.stack([grid.cut(pixels, tile) for tile in tiles])) for pixels in scene.pixels]
        return found[0] if len(found) == 1 else (found[0] - found[1]).abs()

    def _layers(self, images: np.ndarray) -> Tensor:
        patches = [part for _, part in self.extractor.tokens(torch.from_numpy(images), self.layers)]
        side = math.isqrt(patches[0].shape[1])
        return torch.cat(patches, 2).transpose(1, 2).unflatten(2, (side, side))


def _cut_mask(mask: np.ndarray, tile: Tile, size: int) -> np.ndarray:
    """The mask of a tile, int16 [size, size]."""
    out = np.full((size, size), IGNORED, np.int16)
    out[: tile.height, : tile.width] = mask[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
    return out


def _free_memory() -> int:
    """Bytes that new arrays may take: Linux's estimate, which counts the page cache as free."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
