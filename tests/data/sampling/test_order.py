"""Order of samples: shuffled, sharded, a pure function of the position."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pera_fast.data.sampling.order import SampleOrder
from pera_fast.errors import UserError

SHAPES = {
    "batch": st.integers(1, 5),
    "accumulate": st.integers(1, 3),
    "world": st.integers(1, 4),
    "extra": st.integers(0, 70),
    "seed": st.integers(0, 2**63 - 1),
}


def orders(n, batch, accumulate, world, seed):
    return [
        SampleOrder(n, seed=seed, batch_size=batch, accumulate=accumulate, rank=rank, world_size=world)
        for rank in range(world)
    ]


@given(**SHAPES)
@settings(max_examples=60, deadline=None)
def test_an_epoch_takes_every_sample_at_most_once_and_leaves_less_than_a_step(batch, accumulate, world, extra, seed):
    total = batch * accumulate * world
    n = total + extra
    ranks = orders(n, batch, accumulate, world, seed)
    micro_steps = ranks[0].steps_per_epoch * accumulate
    taken = np.concatenate([rank(step)[1] for step in range(micro_steps) for rank in ranks])
    assert len(taken) == len(set(taken.tolist())) == n // total * total
    assert taken.min() >= 0
    assert taken.max() < n
    assert [ranks[0](step)[0] for step in (0, micro_steps - 1, micro_steps)] == [0, 0, 1]


@given(**SHAPES)
@settings(max_examples=60, deadline=None)
def test_sharding_and_accumulation_do_not_change_what_a_step_takes(batch, accumulate, world, extra, seed):
    total = batch * accumulate * world
    n = total + extra
    whole = SampleOrder(n, seed=seed, batch_size=total)
    ranks = orders(n, batch, accumulate, world, seed)
    assert ranks[0].steps_per_epoch == whole.steps_per_epoch
    for step in range(min(2 * whole.steps_per_epoch, 6)):
        parts = [rank(step * accumulate + part)[1] for part in range(accumulate) for rank in ranks]
        np.testing.assert_array_equal(np.concatenate(parts), whole(step)[1])


@given(start=st.integers(0, 200), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_position_alone_decides(start, seed):
    walked, fresh = (SampleOrder(37, seed=seed, batch_size=3, accumulate=2) for _ in range(2))
    for step in range(start):
        walked(step)
    assert walked(start)[0] == fresh(start)[0] == start // 12
    np.testing.assert_array_equal(walked(start)[1], fresh(start)[1])


def test_epochs_and_seeds_shuffle_differently():
    first = SampleOrder(1000, seed=0, batch_size=1000)
    other = SampleOrder(1000, seed=1, batch_size=1000)
    permutations = [first(0)[1], first(1)[1], other(0)[1], np.arange(1000)]
    for i, a in enumerate(permutations):
        for b in permutations[:i]:
            assert (a == b).mean() < 0.02


def test_too_few_images_say_what_to_do():
    with pytest.raises(UserError, match=r"5 readable image\(s\) are fewer than the 6 of one step .* train.batch_size"):
        SampleOrder(5, seed=0, batch_size=3, world_size=2)
