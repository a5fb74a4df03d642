"""The step beside what a run does meanwhile: a thread that allocates and copies, collectives, a host that never waits.

On a CPU the same bodies run with a recorder that does the work again, and over gloo.
"""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pera_fast.config import load_config
from pera_fast.model.pera import PerA
from pera_fast.profile.batches import random_inputs
from pera_fast.train import distributed
from pera_fast.train import graph as graphs
from pera_fast.train.compute_copies import make_copies
from pera_fast.train.distributed import World, world
from pera_fast.train.fused_update import make_update
from pera_fast.train.graph import StepGraph
from pera_fast.train.optim import make_optimizer, make_scaler
from pera_fast.train.schedules import StepValues
from pera_fast.train.step import LOSSES, StepResult, _backward, launch_step

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
SMALL = ["train.batch_size=4", "train.precision=fp32", "model.prototypes=256", "model.depth=2"]
STEPS = 4
BOTTLENECK = 128
NUMBERS = len(LOSSES) + BOTTLENECK + 2  # of which a step's first all-reduce takes the mean; two say whether to stop
Record = Callable[[Callable[[], Tensor], Callable[[], None]], tuple[Callable[[], None], Tensor]]


def run_again(function: Callable[[], Tensor], forget: Callable[[], None]) -> tuple[Callable[[], None], Tensor]:
    """What ``record`` does, without a graph."""
    out = function()

    def replay() -> None:
        forget()
        out.copy_(function())

    return replay, out


class Trained(NamedTuple):
    """What steps gave."""

    results: list[StepResult]
    parameters: list[Tensor]
    gradients: list[Tensor]


def recorder(device: str) -> Record:
    return graphs.record if device == "cuda" else run_again


def inputs_of(cfg: Any, device: str) -> Any:
    """The batch of every step, where the loader leaves it."""
    made = random_inputs(cfg, 4)
    return made.apply(lambda tensor: tensor.pin_memory()) if device == "cuda" else made


def train(
    device: str, record: Record | None, here: World | None = None, around: Callable[[int], Any] | None = None
) -> Trained:
    """Results of a few steps, the last parameters and the last gradients.

    Args:
        record: makes the step's graph; None: the step runs op by op.
        here: ranks that share gradients; None: one alone.
        around: makes the context in which step number n is launched.
    """
    cfg = load_config("tiny", SMALL)
    here = here or World(0, 1, torch.device(device, 0) if device == "cuda" else torch.device(device))
    torch.manual_seed(0)
    model = PerA(cfg).to(here.device)
    here.share_parameters(model)
    make_copies(model)
    optimizer, scaler = make_optimizer(model.parameters(), cfg), make_scaler(cfg, here.device)
    called = model if record is not None else here.wrap(model, unused=False)
    update, graph = make_update(model, optimizer, scaler), None
    if record is not None:
        graph = StepGraph(lambda x, t: _backward(model, scaler, x, t, 1), model.parameters(), 1, record)
    batch, results = inputs_of(cfg, device), []
    for number in range(STEPS):
        values = StepValues(lr=1e-3, weight_decay=0.1, momentum=0.9, teacher_temp=0.03 + 0.01 * number)
        arguments = called, model, optimizer, scaler, iter([batch]), 1, values, 3.0, here
        if around is None:
            launched = launch_step(*arguments, graph=graph, update=update)
        else:
            with around(number):
                launched = launch_step(*arguments, graph=graph, update=update)
        results.append(launched.result())
    trained = [p for p in model.parameters() if p.grad is not None]
    return Trained(results, [p.detach().cpu() for p in trained], [p.grad.cpu() for p in trained if p.grad is not None])


def same(got: Trained, want: Trained) -> None:
    """Losses, gradient norms and parameters agree as those of a graph and of single operators do (test_graph)."""
    for a, b in zip(got.results, want.results, strict=True):
        assert a.applied
        assert b.applied
        assert a.losses == pytest.approx(b.losses, rel=1e-4)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-3)
    assert len({r.losses["loss"] for r in got.results}) == STEPS
    for a, b in zip(got.parameters, want.parameters, strict=True):
        assert (a - b).norm() <= 1e-2 * a.norm()  # AdamW turns rounding of a small gradient into a step


class Neighbour(threading.Thread):
    """Does what the loader's thread does: allocates, copies to the device on a stream of its own, and waits for it."""

    def __init__(self, device: str) -> None:
        super().__init__(daemon=True)
        self.device, self.rounds = device, 0
        self.failure: Exception | None = None
        self.kept: list[tuple[int, Tensor]] = []  # (value, tensor that is full of it)
        self._end, self._more = threading.Event(), threading.Condition()

    def run(self) -> None:
        try:
            stream = torch.cuda.Stream() if self.device == "cuda" else None
            while not self._end.is_set():
                self._round(stream)
                with self._more:
                    self.rounds += 1
                    self._more.notify_all()
        except Exception as error:
            with self._more:
                self.failure = error
                self._more.notify_all()

    def _round(self, stream: torch.cuda.Stream | None) -> None:
        number = self.rounds
        # Blocks of several sizes, of which the GPU's allocator has none at first.
        size = (1 + number % 7) << (16 if stream is None else 20)
        host = torch.full((size,), number % 251, dtype=torch.uint8, pin_memory=stream is not None)
        with torch.cuda.stream(stream):
            there = host.to(self.device, non_blocking=True).clone()
        if stream is not None:
            stream.synchronize()
        self.kept = [*self.kept[-6:], (number % 251, there)]

    def wait_for(self, rounds: int) -> None:
        """Returns after so many more rounds, all of them begun after this call."""
        with self._more:
            goal = self.rounds + rounds + 1
            done = self._more.wait_for(lambda: self.rounds >= goal or self.failure is not None, timeout=60)
        assert self.failure is None, self.failure
        assert done, "the thread stands still"

    def stop(self) -> None:
        self._end.set()
        self.join(60)
        assert not self.is_alive()


@pytest.mark.parametrize("device", DEVICES)
def test_recording_while_another_thread_allocates_and_copies(device: str) -> None:
    """The recording neither fails nor takes the thread's work in, and replays leave the thread's tensors alone."""
    other, recorded, held = Neighbour(device), [], []

    def record(function: Callable[[], Tensor], forget: Callable[[], None]) -> tuple[Callable[[], None], Tensor]:
        def beside() -> Tensor:
            other.wait_for(2)
            out = function()
            other.wait_for(2)  # in the middle of the recording: nothing has ended it yet
            recorded.append(device == "cuda" and torch.cuda.is_current_stream_capturing())
            held.extend(other.kept[-2:])
            return out

        return recorder(device)(beside, forget)

    want = train(device, None)
    other.start()
    try:
        got = train(device, record)
    finally:
        other.stop()
    assert other.failure is None
    assert any(recorded) == (device == "cuda")
    same(got, want)
    for value, tensor in [*held, *other.kept]:
        assert (tensor == value).all()


class Doubles(World):
    """One rank alone, with twice its gradients."""

    def mean_gradients(self, gradients: list[Tensor]) -> None:
        torch._foreach_mul_(gradients, 2.0)


@pytest.fixture
def one_rank(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[World, list[int]]]:
    """A group of one process, which believes that it is one of two, and the sizes of its all-reduces.

    The second rank would have the same losses and three times the gradients: the mean is twice what this one has.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    sizes: list[int] = []
    real = dist.all_reduce

    def all_reduce(tensor: Tensor) -> None:
        real(tensor)
        tensor *= 2 if tensor.numel() == NUMBERS else 4
        sizes.append(tensor.numel())

    monkeypatch.setattr(distributed, "BUCKET_BYTES", 1 << 20)  # several buckets
    with world(request.param) as here:
        monkeypatch.setattr(dist, "all_reduce", all_reduce)
        yield replace(here, size=2), sizes


@pytest.mark.parametrize("one_rank", DEVICES, indirect=True)
@pytest.mark.parametrize("recorded", [True, False], ids=["graph", "DDP"])
def test_a_rank_of_a_process_group(one_rank: tuple[World, list[int]], recorded: bool) -> None:
    """NCCL on a GPU, whose watchdog looks at events while the step is recorded; gloo on a CPU."""
    here, sizes = one_rank
    device = here.device.type
    assert dist.get_backend() == ("nccl" if device == "cuda" else "gloo")
    record = recorder(device) if recorded else None
    got = train(device, record, here)
    assert sizes.count(NUMBERS) == STEPS
    buckets = len(sizes) - STEPS  # of gradients; DDP has all-reduces of its own, of this one rank
    assert (buckets > STEPS) == recorded
    assert buckets % STEPS == 0
    want = train(device, record, Doubles(0, 1, here.device) if recorded else None)
    same(got, want)
    for a, b in zip(got.gradients, want.gradients, strict=True):
        assert (a - b).norm() <= 0.1 * b.norm()  # one that was not averaged is off by a half


@contextmanager
def no_wait(device: str, number: int) -> Iterator[None]:
    """From the third step on the host may wait for nothing; the first one records, the second finds libraries warm."""
    if device == "cuda" and number >= 2:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
def test_the_host_does_not_wait_in_a_replayed_step(device: str) -> None:
    """Copy of the batch, replay, collectives of one rank, and the update."""
    same(train(device, recorder(device), around=partial(no_wait, device)), train(device, None))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_wait_would_be_seen() -> None:
    with no_wait("cuda", 2), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device="cuda").item()
