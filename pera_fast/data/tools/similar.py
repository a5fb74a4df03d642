"""Finds pairs of similar fingerprints among millions by multi-index hashing (Norouzi, Punjani and Fleet, 2014).

Two hashes that differ in at most t of 64 bits differ in at most t // m bits of one of m parts. So hashes are sorted by
each part, and only those are compared whose part differs in so few bits. m follows from the number of hashes.
"""

from collections.abc import Callable, Iterator
from itertools import combinations, pairwise
from math import comb

import numpy as np

_HASH_BITS = 64
MAX_BITS = 11  # beyond that, most of everything would be compared
_AT_ONCE = 2**22  # pairs compared together


def similar_pairs(
    hashes: np.ndarray,
    means: np.ndarray,
    bits: int,
    levels: int,
    report: Callable[[float], None] = lambda done: None,
) -> tuple[np.ndarray, np.ndarray]:
    """All pairs whose hashes differ in at most `bits` and whose means differ nowhere by more than `levels`.

    Args:
        hashes: uint64 [N].
        means: uint8 [N, K].
        bits: 0 to MAX_BITS.
        levels: 0 to 255.
        report: told the part of the work that is done since it was told last, in all 1.

    Returns:
        (first, second): int64 [pairs], first < second, each pair once, sorted.
    """
    found = []
    parts = _parts(len(hashes), bits)
    for shift, width in parts:
        key = ((hashes >> np.uint64(shift)) & np.uint64(2**width - 1)).astype(np.int64)
        order = np.argsort(key, kind="stable")
        values, starts, counts = np.unique(key[order], return_index=True, return_counts=True)
        masks = _masks(width, bits // len(parts))
        for mask in masks:
            for first, second in _neighbours(values, starts, counts, mask):
                pair = _alike(order[first], order[second], hashes, means, bits, levels)
                if len(pair):
                    found.append(pair)
            report(1 / (len(masks) * len(parts)))
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    pairs = np.unique(np.concatenate(found), axis=0)
    return pairs[:, 0], pairs[:, 1]


def _parts(hashes: int, bits: int) -> list[tuple[int, int]]:
    """(shift, width) of the parts that make the fewest comparisons of so many hashes, were they spread evenly."""

    def cost(count: int) -> float:
        width = _HASH_BITS // count
        masks = sum(comb(width, size) for size in range(bits // count + 1))
        return count * masks * (1 + 0.3 * hashes / 2**width)  # look-ups, and comparisons, which are cheaper

    count = min(range(2, bits + 2) if bits else (1,), key=cost)
    cuts = [_HASH_BITS * part // count for part in range(count + 1)]
    return [(low, high - low) for low, high in pairwise(cuts)] if count > 1 else [(0, 32)]


def _masks(width: int, radius: int) -> list[int]:
    """Every number of so many bits with at most `radius` of them set."""
    return [
        sum(1 << bit for bit in chosen) for size in range(radius + 1) for chosen in combinations(range(width), size)
    ]


def _neighbours(
    values: np.ndarray, starts: np.ndarray, counts: np.ndarray, mask: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places (in the order by part) of all pairs whose parts differ by `mask`, some at a time."""
    at = np.searchsorted(values, values ^ mask).clip(max=len(values) - 1)
    matched = np.flatnonzero((values[at] == values ^ mask) & (values <= values ^ mask))
    left_start, left_count = starts[matched], counts[matched]
    right_start, right_count = starts[at[matched]], counts[at[matched]]
    if mask == 0:
        alone = left_count > 1
        left_start, left_count = left_start[alone], left_count[alone]
        right_start, right_count = left_start, left_count
    # One row of a bucket against the whole other bucket is the unit that is cut into pieces of bounded size.
    row_start = np.repeat(left_start, left_count) + _ranges(left_count)
    row_right, row_width = np.repeat(right_start, left_count), np.repeat(right_count, left_count)
    ends = np.cumsum(row_width)
    begin = 0
    while begin < len(row_width):
        done = ends[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, done + _AT_ONCE, side="right")))
        width = row_width[begin:end]
        first = np.repeat(row_start[begin:end], width)
        second = np.repeat(row_right[begin:end], width) + _ranges(width)
        if mask == 0:
            below = first < second
            first, second = first[below], second[below]
        yield first, second
        begin = end


def _ranges(counts: np.ndarray) -> np.ndarray:
    """0 ... counts[0] - 1, 0 ... counts[1] - 1, ..."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _alike(
    first: np.ndarray, second: np.ndarray, hashes: np.ndarray, means: np.ndarray, bits: int, levels: int
) -> np.ndarray:
    """int64 [pairs, 2] of those that are alike, the lower number first."""
    near = distances(hashes[first], hashes[second]) <= bits
    first, second = first[near], second[near]
    close = (np.abs(means[first].astype(np.int16) - means[second]) <= levels).all(axis=1)
    pairs = np.stack([first[close], second[close]], axis=1)
    pairs.sort(axis=1)
    return pairs


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bits in which uint64 hashes differ."""
    differ = a ^ b
    a16, b16, c16, d16 = (_BITS[(differ >> np.uint64(shift)) & np.uint64(0xFFFF)] for shift in (0, 16, 32, 48))
    return a16 + b16 + c16 + d16


_BITS = np.array([number.bit_count() for number in range(2**16)], np.uint8)
