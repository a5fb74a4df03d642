"""Lets the processes of one start find each other, also after torchrun has started all of them again.

torchrun keeps one key-value store over its restarts (torch 2.13: `DynamicRendezvousHandler._shared_tcp_store_server`),
and in it the addresses that dead processes wrote. A new process that reads one before its successor has overwritten it
tries to connect to nobody, fails, and costs another restart. So all keys of a start get a prefix of their own.
"""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from pera_fast.errors import UserError

PREFIX = "pera"
TIMEOUT = timedelta(minutes=30)
POLL_SECONDS = 0.01


def meet() -> tuple[dist.Store, int, int]:
    """(store, rank, number of processes) for `init_process_group`; the store holds nothing of earlier starts."""
    store, rank, size = next(iter(rendezvous("env://")))
    return dist.PrefixStore(agree(store, rank, size), store), rank, size


def agree(store: dist.Store, rank: int, size: int, timeout: timedelta = TIMEOUT) -> str:
    """The prefix of this start, the same on all its ranks, although the store may have the keys of earlier ones.

    Every process has a name that was never used before. Rank 0 answers whoever asks under the name it finds, again
    and again, until each rank has confirmed under rank 0's own name; answers to the dead are read by nobody.

    Raises:
        UserError: some ranks did not come in time.
    """
    name, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank:
        store.set(f"{PREFIX}/ask/{rank}", name)
        _wait(store, [f"{PREFIX}/answer/{name}"], deadline, f"rank {rank} waits for rank 0, which did not come")
        start = store.get(f"{PREFIX}/answer/{name}").decode()
        store.set(f"{PREFIX}/{start}/{rank}", "")
        return f"{PREFIX}/{start}"
    missing = set(range(1, size))
    while missing:
        for other in missing:
            ask = f"{PREFIX}/ask/{other}"
            if store.check([ask]):
                store.set(f"{PREFIX}/answer/{store.get(ask).decode()}", name)
        missing = {other for other in missing if not store.check([f"{PREFIX}/{name}/{other}"])}
        _pause(deadline, f"rank 0 waits for {len(missing)} of {size} processes, which did not come")
    return f"{PREFIX}/{name}"


def _wait(store: dist.Store, keys: list[str], deadline: float, what: str) -> None:
    while not store.check(keys):
        _pause(deadline, what)


def _pause(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise UserError(f"{what}: see why on its machine; are MASTER_ADDR, RANK and WORLD_SIZE right everywhere?")
    time.sleep(POLL_SECONDS)
