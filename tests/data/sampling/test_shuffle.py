"""The mixing of many shards in an epoch, against that of a perfect shuffle; the shuffle of a buffer fails."""

import numpy as np
import pytest

from pera_fast.data.sampling.order import SampleOrder

SHARDS, EACH, BATCH = 64, 500, 128
COUNT = SHARDS * EACH
SIGMAS = 5.0


def epoch(seed):
    """Samples in the order in which an epoch takes them; sample // EACH is the shard."""
    order = SampleOrder(COUNT, seed=seed, batch_size=BATCH)
    return np.concatenate([order(step)[1] for step in range(order.micro_steps_per_epoch)])


def buffered(seed, size=2000):
    """What readers do that read in order: shards in random order, a buffer from which one is drawn at random."""
    rng = np.random.default_rng(seed)
    stream = np.concatenate([shard * EACH + np.arange(EACH) for shard in rng.permutation(SHARDS)])
    buffer, taken = list(stream[:size]), []
    for sample in stream[size:]:
        slot = int(rng.integers(size))
        taken.append(buffer[slot])
        buffer[slot] = sample
    return np.array([*taken, *rng.permutation(buffer)])


def statistics(order):
    """(measured, expected of a uniform permutation, standard deviation) by name."""
    n, shard = len(order), order // EACH
    same = (EACH - 1) / (COUNT - 1)
    batches = shard[: n // BATCH * BATCH].reshape(-1, BATCH)
    distinct = np.array([len(np.unique(row)) for row in batches])
    empty = (1 - 1 / SHARDS) ** BATCH
    # Number of shards that a batch of independent draws touches: the occupancy problem's mean and variance.
    expected = SHARDS * (1 - empty)
    variance = SHARDS * (SHARDS - 1) * (1 - 2 / SHARDS) ** BATCH + SHARDS * empty - SHARDS**2 * empty**2
    displacement = np.abs(order - np.arange(n)) / n
    lag = np.corrcoef(order[:-1], order[1:])[0, 1]
    return {
        "adjacent from one shard": ((shard[1:] == shard[:-1]).mean(), same, np.sqrt(same * (1 - same) / n)),
        "mean displacement": (displacement.mean(), 1 / 3, np.sqrt(1 / 18 / n)),
        "shards in a batch": (distinct.mean(), expected, np.sqrt(variance / len(batches))),
        "correlation of neighbours": (lag, 0.0, 1 / np.sqrt(n)),
    }


def deviations(order):
    return {name: (found - expected) / sigma for name, (found, expected, sigma) in statistics(order).items()}


@pytest.mark.parametrize("seed", range(4))
def test_an_epoch_mixes_the_shards_as_a_perfect_shuffle_does(seed):
    assert COUNT % BATCH == 0
    order = epoch(seed)
    assert np.array_equal(np.sort(order), np.arange(COUNT))
    assert all(abs(sigmas) < SIGMAS for sigmas in deviations(order).values()), statistics(order)


def test_each_shard_is_spread_over_the_whole_epoch():
    """Counts of every shard in every sixteenth of the epoch: chi-squared against equal shares."""
    parts = epoch(0).reshape(16, -1) // EACH
    counts = np.array([np.bincount(part, minlength=SHARDS) for part in parts])
    expected = EACH / 16
    chi = ((counts - expected) ** 2 / expected).sum()
    freedom = 15 * (SHARDS - 1)
    assert abs(chi - freedom) < SIGMAS * np.sqrt(2 * freedom)


def test_a_buffers_shuffle_would_be_noticed():
    found = deviations(buffered(0))
    assert found["adjacent from one shard"] > 10 * SIGMAS
    assert found["shards in a batch"] < -10 * SIGMAS


if __name__ == "__main__":
    for name, order in (("permutation", epoch(0)), ("buffer of 2000", buffered(0))):
        for what, (found, expected, sigma) in statistics(order).items():
            print(f"{name:<16}{what:<28}{found:10.5f}   ideal {expected:10.5f} +- {sigma:.5f}")
