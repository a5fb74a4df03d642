"""Processes of one start find each other in a store that still has what earlier ones wrote."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from pera_fast.errors import UserError
from pera_fast.train import meeting
from pera_fast.train.meeting import agree

SIZE = 3


def start(store: dist.Store, order: tuple[int, ...]) -> set[str]:
    """Prefixes of all ranks, begun in this order."""
    with ThreadPoolExecutor(SIZE) as pool:
        return set(pool.map(lambda rank: agree(store, rank, SIZE), order))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_every_start_agrees_on_a_prefix_of_its_own(order: tuple[int, ...]):
    store = dist.HashStore()
    prefixes = [start(store, order) for _ in range(4)]
    assert all(len(ranks) == 1 for ranks in prefixes)
    assert len(set.union(*prefixes)) == 4


def test_asked_and_answered_by_processes_that_are_gone():
    """Rank 1 of a start that never met its rank 0; and a rank 0 that answered and died before it was read."""
    store = dist.HashStore()
    store.set(f"{meeting.PREFIX}/ask/1", "dead")
    store.set(f"{meeting.PREFIX}/answer/dead", "gone")
    assert len(start(store, (0, 1, 2))) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_process_that_does_not_come(rank: int):
    with pytest.raises(UserError, match="did not come"):
        agree(dist.HashStore(), rank, SIZE, timeout=timedelta(seconds=0.05))


def test_one_process_meets_nobody():
    assert agree(dist.HashStore(), 0, 1).startswith(meeting.PREFIX)
