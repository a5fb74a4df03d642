"""Keyed randomness: each draw comes from a counter-based generator with a key for its purpose.

A stream of random numbers depends on everything that was drawn before it; a keyed draw depends on its key only. So a
resumed run, another number of ranks or loader threads, or a skipped file changes nothing for the other samples.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """Purposes of draws. The numbers are part of a run's reproducibility: never renumber, only append."""

    SHUFFLE = 1  # counter: epoch
    WINDOW = 2  # crop windows and flips; counter: epoch, sample
    COLOR = 3  # jitter of both views; counter: epoch, sample
    MASK = 4  # patch ranks; counter: epoch, sample
    SUBSTITUTE = 5  # which sample stands in for an unreadable one; counter: epoch, sample
    DROP_PATH = 6  # sequences kept by stochastic depth; counter: micro-step, rank
    SCENE = 7  # procedural demo scenes; counter: class, index
    MEASURE = 8  # files over which bands are measured
    LABELS = 9  # labelled samples of a share, in evaluations; counter: class
    BOOTSTRAP = 10  # test samples drawn with replacement
    AUGMENT = 11  # crop, flips and turn of a labelled image; counter: epoch, sample
    ROADS = 20  # procedural pictures of roads; counter: index
    CHANGES = 21  # procedural pairs; counter: index, and 1 or 2 for the light before and after


def generator(seed: int, purpose: Purpose, *counter: int) -> np.random.Generator:
    """A generator that depends on (seed, purpose, counter) alone.

    Args:
        seed: the run's seed, 0 <= seed < 2**63.
        purpose: what the draws are for.
        counter: up to three non-negative integers, such as (epoch, sample).

    Returns:
        A Philox-4x64 generator. Distinct keys give independent streams of 2**64 blocks each.
    """
    if len(counter) > 3:
        raise ValueError(f"at most three counters name a draw, got {len(counter)}")
    words = np.zeros(4, dtype=np.uint64)
    words[1 : 1 + len(counter)] = counter  # word 0 counts the blocks of this stream
    key = np.array([seed, int(purpose)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=words, key=key))
