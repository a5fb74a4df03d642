"""Tiles cover an image, and their blended logits have no seams."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pera_fast.features.tiles import TileGrid, blend, tiled

grids = st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 24), st.integers(0, 23)).map(
    lambda sizes: TileGrid(sizes[0], sizes[1], sizes[2], min(sizes[3], sizes[2] - 1))
)


def joined(grid: TileGrid, rows) -> torch.Tensor:
    """All rows [K, H, W], which must come in order, each once."""
    parts, next_top = [], 0
    for top, part in rows:
        assert top == next_top
        assert part.shape[1] > 0
        next_top += part.shape[1]
        parts.append(part)
    assert next_top == grid.height
    return torch.cat(parts, 1)


@settings(deadline=None, max_examples=60)
@given(grids)
def test_tiles_cover_the_image_and_stay_inside(grid: TileGrid) -> None:
    covered = np.zeros((grid.height, grid.width), int)
    tiles = list(grid)
    assert [grid[number] for number in range(len(grid))] == tiles
    for tile in tiles:
        assert tile.top + tile.height <= grid.height
        assert tile.left + tile.width <= grid.width
        covered[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width] += 1
    assert covered.min() >= 1
    for starts in (grid.tops, grid.lefts):
        assert all(0 < after - before <= grid.size - grid.overlap for before, after in pairwise(starts))


@settings(deadline=None, max_examples=60)
@given(grids, st.floats(-1e4, 1e4, width=32))
def test_constant_logits_stay_constant_to_the_bit(grid: TileGrid, value: float) -> None:
    constant = torch.tensor([value, -value / 3])[:, None, None].expand(2, grid.size, grid.size)
    out = joined(grid, blend(grid, [constant] * len(grid)))
    assert out.shape == (2, grid.height, grid.width)
    assert torch.equal(out, constant[:, :1, :1].expand_as(out))


@settings(deadline=None, max_examples=40)
@given(grids)
def test_tiles_that_agree_give_the_image_back(grid: TileGrid) -> None:
    image = np.random.default_rng(0).integers(0, 256, (grid.height, grid.width, 3), np.uint8)
    rows = tiled(grid, lambda tile: grid.cut(image, tile), lambda batch: batch.movedim(3, 1).float(), batch_size=3)
    assert torch.equal(joined(grid, rows), torch.from_numpy(image).movedim(2, 0).float())


def test_tiles_that_differ_are_blended_as_the_weighted_mean_and_without_a_step() -> None:
    grid = TileGrid(40, 64, size=32, overlap=16)
    logits = torch.randn(len(grid), 2, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 32, 32)
    out = joined(grid, blend(grid, logits))
    place = np.arange(32)
    ramp = np.sin(np.minimum((np.minimum(place, 31 - place) + 0.5) / 16, 1) * np.pi / 2) ** 2
    weight = np.outer(ramp, ramp)
    above, below = np.zeros((2, 40, 64)), np.zeros((40, 64))
    for tile, value in zip(grid, logits.double().numpy(), strict=True):
        here = np.s_[..., tile.top : tile.top + 32, tile.left : tile.left + 32]
        above[here] += weight * value
        below[here] += weight
    np.testing.assert_allclose(out.numpy(), above / below, rtol=0, atol=2e-6)
    across = (out[:, :, 1:] - out[:, :, :-1]).abs().max()
    assert across < 0.2 * (logits.max() - logits.min())  # a step between tiles would be the whole of it


def test_an_image_below_the_tile_size_is_reflected_and_cut() -> None:
    grid = TileGrid(3, 2, size=6, overlap=2)
    image = np.arange(6).reshape(3, 2)
    (tile,) = grid
    whole = grid.cut(image, tile)
    assert whole.tolist() == np.pad(image, [(0, 3), (0, 4)], mode="reflect").tolist()
    out = joined(grid, blend(grid, [torch.from_numpy(whole)[None]]))
    assert out[0].tolist() == image.tolist()


def test_finished_rows_come_before_later_tiles_are_asked_for() -> None:
    grid = TileGrid(100, 10, size=10, overlap=2)
    asked = 0

    def logits():
        nonlocal asked
        for _ in grid:
            asked += 1
            yield torch.zeros(1, 10, 10)

    for number, (top, rows) in enumerate(blend(grid, logits()), 1):
        assert asked == number * len(grid.lefts)
        assert rows.untyped_storage().nbytes() == rows.numel() * 4  # no view of something larger
        assert top == grid.tops[number - 1]


@pytest.mark.parametrize(("height", "size", "overlap"), [(0, 4, 0), (4, 0, 0), (4, 4, 4), (4, 4, -1)])
def test_impossible_grids_are_refused(height: int, size: int, overlap: int) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        TileGrid(height, 4, size, overlap)
