"""Cuts images into overlapping tiles of a network's input, and blends the tiles' logits without seams.

    grid = TileGrid(height, width, size=512, overlap=128)
    for top, rows in tiled(grid, lambda tile: grid.cut(image, tile), run, batch_size=8):
        classes[top : top + rows.shape[1]] = rows.argmax(0)

Rows come out as soon as no later tile covers them: the logits of one row of tiles are in memory, whatever the image's
height.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Tile(NamedTuple):
    """A tile's window in its image; where the image is smaller than a tile, the window is the image."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class TileGrid:
    """Tiles that cover an image, row by row.

    Attributes:
        height, width: of the image, at least 1.
        size: pixels a side of a tile.
        overlap: pixels that neighbours share at least, below size. The last tile of a row or column is shifted inwards,
            so that it overlaps its neighbour by more rather than reach beyond the image.
    """

    height: int
    width: int
    size: int
    overlap: int = 0

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.size) < 1:
            raise ValueError(f"height, width and size must be at least 1, got {self}")
        if not 0 <= self.overlap < self.size:
            raise ValueError(f"overlap must be at least 0 and below the size {self.size}, got {self.overlap}")

    @property
    def tops(self) -> list[int]:
        """First pixel row of each row of tiles."""
        return _starts(self.height, self.size, self.overlap)

    @property
    def lefts(self) -> list[int]:
        """First pixel column of each column of tiles."""
        return _starts(self.width, self.size, self.overlap)

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def __getitem__(self, number: int) -> Tile:
        """A tile by its number, counted row by row. Raises IndexError for one that there is not."""
        lefts = self.lefts
        row, column = divmod(number, len(lefts))
        top, left = self.tops[row], lefts[column]
        return Tile(top, left, min(self.size, self.height), min(self.size, self.width))

    def __iter__(self) -> Iterator[Tile]:
        height, width = min(self.size, self.height), min(self.size, self.width)
        return (Tile(top, left, height, width) for top in self.tops for left in self.lefts)

    def pad(self, window: np.ndarray) -> np.ndarray:
        """A tile's window [h, w, ...] as a whole tile [size, size, ...]: right and below, the image is reflected."""
        below, right = self.size - window.shape[0], self.size - window.shape[1]
        if not below and not right:
            return window
        return np.pad(window, [(0, below), (0, right), *[(0, 0)] * (window.ndim - 2)], mode="reflect")

    def cut(self, image: np.ndarray, tile: Tile) -> np.ndarray:
        """A whole tile [size, size, ...] of an image [H, W, ...] in memory; a view where nothing is padded."""
        return self.pad(image[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width])


def _starts(length: int, size: int, overlap: int) -> list[int]:
    if length <= size:
        return [0]
    return [*range(0, length - size, size - overlap), length - size]


def tiled(
    grid: TileGrid, read: Callable[[Tile], np.ndarray], run: Callable[[Tensor], Tensor], batch_size: int
) -> Iterator[tuple[int, Tensor]]:
    """Blended logits of an image of any size, in rows.

    Args:
        grid: the image's tiles.
        read: gives a tile as an array [size, size, C] of any dtype, such as `grid.cut` does.
        run: tiles [n, size, size, C] -> logits [n, K, size, size] on any device, n at most batch_size.
        batch_size: tiles at a time.

    Yields:
        (top, rows), as `blend` does.
    """

    def logits() -> Iterator[Tensor]:
        tiles = iter(grid)
        while some := list(islice(tiles, batch_size)):
            yield from run(torch.from_numpy(np.stack([read(tile) for tile in some])))

    return blend(grid, logits())


def blend(grid: TileGrid, logits: Iterable[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Weighted means of the logits of overlapping tiles; weights fall smoothly towards a tile's border.

    A mean is updated by `mean += (logit - mean) * weight / weights so far`: equal logits stay what they are, to the
    bit. Where one tile alone covers a pixel, its logit stays likewise.

    Args:
        grid: the image's tiles.
        logits: of each tile in the grid's order, [K, size, size].

    Yields:
        (top, rows): float32 [K, h, W] of pixel rows top to top + h on the logits' device; from top to bottom, each row
        of the image once. The caller may keep them.
    """
    width, tops, lefts = grid.width, grid.tops, grid.lefts
    found = iter(logits)
    mean, total, weight = torch.empty(0), torch.empty(0), torch.empty(0)
    for number, top in enumerate(tops):
        for left in lefts:
            tile = next(found).float()
            if not mean.numel():
                weight = _weights(grid, tile.device)
                mean = tile.new_zeros(len(tile), grid.size, max(width, grid.size))
                total = mean.new_zeros(mean.shape[1:])
            here = slice(left, left + grid.size)
            total[:, here] += weight
            mean[:, :, here] += (tile - mean[:, :, here]) * (weight / total[:, here])
        done = tops[number + 1] - top if number + 1 < len(tops) else grid.height - top
        yield top, mean[:, :done, :width].clone()
        mean, total = _moved_up(mean, done), _moved_up(total, done)


def _moved_up(rows: Tensor, done: int) -> Tensor:
    """Rows [..., S, W] without the first `done`, zeros behind."""
    moved = torch.zeros_like(rows)
    moved[..., : rows.shape[-2] - done, :] = rows[..., done:, :]
    return moved


def _weights(grid: TileGrid, device: torch.device) -> Tensor:
    """float32 [size, size], above 0: 1 inside, a squared sine over the overlap at each side."""
    place = torch.arange(grid.size, dtype=torch.float64)
    edge = (torch.minimum(place, grid.size - 1 - place) + 0.5) / max(grid.overlap, 0.5)  # 0.5: no ramp
    ramp = (edge.clamp(max=1) * torch.pi / 2).sin().square()
    return torch.outer(ramp, ramp).float().to(device)
