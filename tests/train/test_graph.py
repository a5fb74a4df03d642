"""The recorded step: on a CPU with a recorder that runs the work again, on a GPU for real."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pera_fast.config import Config, load_config
from pera_fast.errors import UserError
from pera_fast.model.pera import PerA
from pera_fast.profile.batches import blank_batch
from pera_fast.train import step
from pera_fast.train.distributed import World
from pera_fast.train.fused_update import make_update
from pera_fast.train.graph import StepGraph
from pera_fast.train.inputs import make_inputs
from pera_fast.train.optim import make_optimizer, make_scaler
from pera_fast.train.schedules import StepValues
from pera_fast.train.step import _backward, make_graph, train_step

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SMALL = ["train.batch_size=4", "train.precision=fp32", "model.prototypes=256", "model.depth=2"]


def run_again(
    function: Callable[[], Tensor], forget: Callable[[], None], accumulate: int
) -> tuple[Callable[[], None], Tensor]:
    """What ``record`` does, without a graph: with one micro-batch a replay writes the gradients anew."""
    out = function()

    def replay() -> None:
        if accumulate == 1:
            forget()
        out.copy_(function())

    return replay, out


def batches(cfg: Config, count: int):
    for number in range(count):
        batch = blank_batch(cfg, 4)
        batch.micro_step = number
        for group in (batch.global_, batch.local):
            group.pixels.random_(0, 256, generator=torch.Generator().manual_seed(number))
        yield make_inputs(batch, cfg)


def train(
    device: torch.device, accumulate: int, graph: Callable[..., Any] | None, here: World | None = None
) -> tuple[list[float], list[Tensor]]:
    """Losses and last parameters of four steps with a changing temperature."""
    cfg = load_config("tiny", SMALL)
    torch.manual_seed(0)
    model = PerA(cfg).to(device)
    here = here or World(0, 1, device)
    optimizer, scaler = make_optimizer(model.parameters(), cfg), make_scaler(cfg, device)
    inputs, losses = batches(cfg, 4 * accumulate), []
    recorded = None if graph is None else graph(model, scaler, accumulate)
    called = here.wrap(model, unused=False) if graph is None else model
    here.share_parameters(model)
    for number in range(4):
        values = StepValues(lr=1e-3, weight_decay=0.1, momentum=0.9, teacher_temp=0.03 + 0.01 * number)
        result = train_step(called, model, optimizer, scaler, inputs, accumulate, values, 3.0, here, graph=recorded)
        losses.append(result.losses["loss"])
    return losses, [p.detach().cpu() for p in model.parameters()]


def same(device: torch.device, accumulate: int, graph: Callable[..., Any] | None, here: World | None = None) -> None:
    plain, recorded = train(device, accumulate, None), train(device, accumulate, graph, here)
    assert recorded[0] == pytest.approx(plain[0], rel=1e-4)
    assert len(set(recorded[0])) == 4
    for a, b in zip(plain[1], recorded[1], strict=True):
        assert (a - b).norm() <= 1e-2 * a.norm()  # AdamW turns rounding of a small gradient into a step


def rerun(model: PerA, scaler: torch.amp.GradScaler, accumulate: int) -> StepGraph:
    """What ``make_graph`` makes, with a recorder for any device."""
    return StepGraph(
        lambda x, t: _backward(model, scaler, x, t, accumulate), model.parameters(), accumulate,
        partial(run_again, accumulate=accumulate),
    )  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 2])
def test_replays_give_what_steps_give(accumulate: int) -> None:
    same(torch.device("cpu"), accumulate, rerun)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_cuda_graph_gives_what_steps_give(accumulate: int) -> None:
    same(torch.device("cuda"), accumulate, make_graph)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("with_graph", [False, True], ids=["launches", "graph"])
def test_nothing_in_a_step_waits_for_the_host(with_graph: bool, precision: str) -> None:
    """Forward, backward, update, center and EMA as the trainer launches them, from the second step on."""
    device = torch.device("cuda", 0)
    cfg = load_config("tiny", [*SMALL, f"train.precision={precision}"])
    model = PerA(cfg).to(device)
    optimizer, scaler = make_optimizer(model.parameters(), cfg), make_scaler(cfg, device)
    graph, update = make_graph(model, scaler, 1) if with_graph else None, make_update(model, optimizer, scaler)
    assert update is not None
    inputs = iter([batch.to(device) for batch in batches(cfg, 5)])
    values = StepValues(lr=1e-3, weight_decay=0.1, momentum=0.9, teacher_temp=0.04)
    launched = []
    for number in range(5):
        torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")  # the first ones compile and record
        try:
            launched.append(
                step.launch_step(
                    model, model, optimizer, scaler, inputs, 1, values, 3.0, World(0, 1, device), graph=graph,
                    update=update,
                )
            )  # fmt: skip
        finally:
            torch.cuda.set_sync_debug_mode("default")
    results = [one.result() for one in launched]
    assert all(result.applied for result in results) or precision == "fp16"  # whose first scales may be too large
    assert len({result.losses["loss"] for result in results}) == 5


def test_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(UserError, match=r"^train.cuda_graph=true: goes with loss.centering=center only"):
        load_config("tiny", ["train.cuda_graph=true", "loss.centering=sinkhorn"])


class Clock:
    """An event of a device that is done at once: its time is the host's."""

    def __init__(self, _device: torch.device) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, other: "Clock") -> float:
        """Milliseconds from this event to another."""
        return 1000 * (other.time - self.time)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_time_without_data_is_idle_time(accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that has nothing to do until its batches come: they take .2 s each."""
    monkeypatch.setattr(step, "_mark", Clock)
    cfg, device = load_config("tiny", SMALL), torch.device("cpu")
    model = PerA(cfg)
    optimizer, scaler = make_optimizer(model.parameters(), cfg), make_scaler(cfg, device)

    def late() -> Iterator[Any]:
        for batch in batches(cfg, accumulate):
            time.sleep(0.2)
            yield batch

    values = StepValues(lr=1e-3, weight_decay=0.1, momentum=0.9, teacher_temp=0.04)
    before: Any = Clock(device)
    launched = step.launch_step(
        model, model, optimizer, scaler, late(), accumulate, values, 3.0, World(0, 1, device)
    )  # fmt: skip
    total = before.elapsed_time(launched.end) / 1000
    assert 0.2 * accumulate <= launched.idle_since(before) < total
