"""Draws disjoint masks: the patches that the student sees, those that it predicts, those that the teacher sees.

Source: docs/method.md section 3.1.
A mask is a rank per patch: the student sees the lowest ranks, the teacher the highest, the ones between are predicted.
The published pattern ranks patches in random order; ``block`` and ``grid`` rank them in spatial order instead, so that
what is seen lies in contiguous blocks or spread evenly over the crop.
"""

import numpy as np


def draw_ranks(rng: np.random.Generator, crops: int, grid: int, pattern: str) -> np.ndarray:
    """Draw the rank of each patch of some crops of one size.

    Args:
        rng: source of the draws.
        crops: how many crops.
        grid: patches per side.
        pattern: "random" (published), "block" or "grid".

    Returns:
        int32 [crops, grid * grid], each row a permutation of 0 .. L - 1 in raster order of the patches.
    """
    patches = grid * grid
    if pattern == "random":
        order = np.tile(np.arange(patches, dtype=np.int32), (crops, 1))
        return rng.permuted(order, axis=1)
    if pattern == "block":
        score = np.stack([_block_score(rng, grid) for _ in range(crops)])
    elif pattern == "grid":
        score = np.stack([_grid_score(rng, grid) for _ in range(crops)])
    else:
        raise ValueError(f"no ranks for masking pattern {pattern!r}: use one of random, block, grid")
    return score.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable").astype(np.int32)


def _block_score(rng: np.random.Generator, grid: int) -> np.ndarray:
    """Square blocks in random order from a random origin: ranks run through one block after the other."""
    side = max(2, round(grid / 7))
    y0, x0 = rng.integers(0, side, 2)
    blocks = (grid + side - 1) // side + 1
    y, x = np.divmod(np.arange(grid * grid), grid)
    return rng.permutation(blocks * blocks)[(y + y0) // side * blocks + (x + x0) // side]


def _grid_score(rng: np.random.Generator, grid: int) -> np.ndarray:
    """An ordered-dither matrix, shifted at random: any range of ranks is spread evenly over the crop."""
    side = 1
    bayer = np.zeros((1, 1))
    while side < min(grid, 8):
        bayer = np.block([[4 * bayer, 4 * bayer + 2], [4 * bayer + 3, 4 * bayer + 1]])
        side *= 2
    y0, x0 = rng.integers(0, side, 2)
    y, x = np.divmod(np.arange(grid * grid), grid)
    # Places of one matrix cell tie; a random fraction breaks ties without crossing into the next cell.
    return bayer[(y + y0) % side, (x + x0) % side] + rng.random(grid * grid)


def indices_from_ranks(rank: np.ndarray, student: int, predicted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patch numbers that the student sees, that are predicted, and that the teacher sees.

    Args:
        rank: [crops, L], each row a permutation of 0 .. L - 1.
        student: the student sees ranks below this.
        predicted: the ranks that follow are predicted; the teacher sees the rest. Both counts are those of
            docs/method.md section 3.1, see ``ModelConfig.patch_counts``.

    Returns:
        Three disjoint int32 arrays [crops, n], each row ascending (raster order).
    """
    order = rank.argsort(axis=1, kind="stable").astype(np.int32)
    parts = np.split(order, [student, student + predicted], axis=1)
    seen, missing, taught = (np.sort(part, axis=1) for part in parts)
    return seen, missing, taught


def dense_indices(crops: int, patches: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """masking "none": both networks see every patch and nothing is predicted, the dense baseline."""
    every = np.tile(np.arange(patches, dtype=np.int32), (crops, 1))
    return every, np.empty((crops, 0), np.int32), every
