"""Disjoint masks: partition, counts, patterns, keyed draws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pera_fast.config import load_config
from pera_fast.data.sampling.masks import dense_indices, draw_ranks, indices_from_ranks
from pera_fast.keyed import Purpose, generator

PATTERNS = ["random", "block", "grid"]


@given(st.integers(1, 5), st.integers(2, 28), st.sampled_from(PATTERNS), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_ranks_are_permutations(crops: int, grid: int, pattern: str, seed: int) -> None:
    ranks = draw_ranks(np.random.default_rng(seed), crops, grid, pattern)
    assert ranks.dtype == np.int32
    assert np.array_equal(np.sort(ranks, axis=1), np.tile(np.arange(grid * grid), (crops, 1)))


@given(st.integers(1, 4), st.integers(2, 14), st.integers(0, 2**32), st.data())
@settings(max_examples=60, deadline=None)
def test_indices_partition_the_patches(crops: int, grid: int, seed: int, data: st.DataObject) -> None:
    patches = grid * grid
    student = data.draw(st.integers(0, patches))
    predicted = data.draw(st.integers(0, patches - student))
    ranks = draw_ranks(np.random.default_rng(seed), crops, grid, "random")
    seen, missing, taught = indices_from_ranks(ranks, student, predicted)
    assert (seen.shape[1], missing.shape[1]) == (student, predicted)
    for part in (seen, missing, taught):
        assert part.dtype == np.int32
        assert np.all(np.diff(part, axis=1) > 0)
    together = np.sort(np.concatenate([seen, missing, taught], axis=1), axis=1)
    assert np.array_equal(together, np.tile(np.arange(patches), (crops, 1)))
    if student:
        assert np.take_along_axis(ranks, seen.astype(np.int64), 1).max() == student - 1


def test_published_counts() -> None:
    model = load_config("vit_b16", []).model
    assert model.patch_counts(784) == (157, 157, 470)
    assert model.patch_counts(36) == (7, 7, 22)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_patch_is_as_likely_to_be_seen(pattern: str) -> None:
    grid, draws = 8, 4000
    ranks = draw_ranks(np.random.default_rng(0), draws, grid, pattern)
    seen = (ranks < round(0.2 * grid * grid)).mean(axis=0)
    share = round(0.2 * grid * grid) / grid**2
    # Blocks are cut at the border, so a border patch shares its block with fewer others: allow a wider band there.
    spread = 0.35 if pattern == "block" else 6 * (share * (1 - share) / draws) ** 0.5 / share
    assert np.abs(seen / share - 1).max() < spread


def neighbours_in_same_set(ranks: np.ndarray, grid: int, cut: int) -> float:
    mask = (ranks < cut).reshape(-1, grid, grid)
    return float(((mask[:, 1:] == mask[:, :-1]) & mask[:, 1:]).sum() / mask.sum())


def test_patterns_differ_in_contiguity() -> None:
    grid, cut = 16, 51
    rng = np.random.default_rng(1)
    share = {p: neighbours_in_same_set(draw_ranks(rng, 200, grid, p), grid, cut) for p in PATTERNS}
    assert share["block"] > 2 * share["random"]
    assert share["grid"] < 0.6 * share["random"]


def test_unknown_pattern() -> None:
    with pytest.raises(ValueError, match="chess"):
        draw_ranks(np.random.default_rng(0), 1, 4, "chess")


def test_dense_indices_see_everything() -> None:
    student, predicted, teacher = dense_indices(3, 9)
    assert predicted.shape == (3, 0)
    assert np.array_equal(student, teacher)
    assert np.array_equal(student[2], np.arange(9))


def test_keyed_draws_do_not_depend_on_each_other() -> None:
    first = generator(7, Purpose.MASK, 2, 41).random(5)
    generator(7, Purpose.MASK, 2, 40).random(1000)
    assert np.array_equal(generator(7, Purpose.MASK, 2, 41).random(5), first)
    others = [(8, Purpose.MASK, 2, 41), (7, Purpose.COLOR, 2, 41), (7, Purpose.MASK, 3, 41), (7, Purpose.MASK, 2, 42)]
    for seed, purpose, *counter in others:
        assert not np.array_equal(generator(seed, purpose, *counter).random(5), first)
    with pytest.raises(ValueError, match="three"):
        generator(1, Purpose.MASK, 1, 2, 3, 4)
