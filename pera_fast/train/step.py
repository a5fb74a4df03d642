"""One optimiser step: micro-batches, gradients, update, center, EMA."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ParamSpec

import torch
from torch import Tensor, nn

from pera_fast.model.inputs import StepInputs
from pera_fast.model.pera import PerA
from pera_fast.ranges import span
from pera_fast.train.distributed import World, gradient_sync
from pera_fast.train.fused_update import FusedUpdate
from pera_fast.train.graph import StepGraph
from pera_fast.train.optim import apply_gradients
from pera_fast.train.schedules import StepValues

P = ParamSpec("P")
LOSSES: tuple[str, ...] = ("loss", "global_cls_loss", "local_cls_loss", "koleo_loss", "pixel_loss")


@dataclass(frozen=True)
class StepResult:
    """Result of a step, on the host.

    Attributes:
        losses: total and logged parts, means over micro-batches and ranks (docs/method.md section 5.5).
        grad_norm: before clipping.
        applied: False if something was not finite: then parameters, teacher and center are as before.
        stop: over all ranks, whether each signal came, in the order that `launch_step` was given.
        loss_scale: after this step; None without loss scaling.
    """

    losses: dict[str, float]
    grad_norm: float
    applied: bool
    stop: tuple[bool, ...]
    loss_scale: float | None = None

    @property
    def nonfinite(self) -> list[str]:
        """Names of what was not finite."""
        bad = [name for name, value in self.losses.items() if not math.isfinite(value)]
        if not bad and not math.isfinite(self.grad_norm):
            bad = ["gradients"]
        return bad if bad or self.applied else ["teacher_mean"]


@dataclass
class LaunchedStep:
    """A step whose work was handed to the device; the host has not waited for it.

    Attributes:
        numbers: losses, a number above 0 for each signal that came, gradient norm, whether the update was made, loss
            scale (0: none); float64 on the host, where they arrive when ``end`` has passed.
        begin, end: CUDA events around the step's work, from when its first micro-batch is there; None on a CPU, where
            the work is done.
        gaps: CUDA events around the waits for its other micro-batches; empty on a CPU.
    """

    numbers: Tensor
    begin: torch.cuda.Event | None = None
    end: torch.cuda.Event | None = None
    gaps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def idle_since(self, event: torch.cuda.Event) -> float:
        """Seconds in which the device had nothing to do since an event that came before the step, which has ended."""
        assert self.begin is not None
        waits = [(event, self.begin), *self.gaps]
        return sum(start.elapsed_time(end) for start, end in waits) / 1000

    def result(self) -> StepResult:
        """Wait for the step and read what it gave."""
        if self.end is not None:
            self.end.synchronize()
        *numbers, norm, applied, scale = self.numbers.tolist()
        named = dict(zip(LOSSES, numbers[: len(LOSSES)], strict=True))
        return StepResult(named, norm, bool(applied), tuple(n > 0 for n in numbers[len(LOSSES) :]), scale or None)


def launch_step(
    model: nn.Module,
    pera: PerA,
    optimizer: torch.optim.AdamW,
    scaler: torch.amp.GradScaler,
    batches: Iterator[StepInputs],
    accumulate: int,
    values: StepValues,
    clip: float,
    world: World,
    stop: Callable[[], tuple[bool, ...]] = lambda: (False, False),
    graph: StepGraph | None = None,
    update: FusedUpdate | None = None,
) -> LaunchedStep:
    """Take `accumulate` micro-batches from `batches` and make one update; with `update` the host waits for nothing.

    Args:
        model: called for the losses; `pera` itself, or `pera` in DDP.
        pera: the model with its center and teacher.
        batches: gives the micro-batches, on any device.
        stop: says whether each of some signals came to this process; all ranks learn it, in `StepResult.stop`.
        graph: made by `make_graph`, runs the micro-batches; None: they run op by op.
        update: made by `make_update`; None: PyTorch's operators, and the host looks whether all is finite.
    """
    arrivals: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # before and after each micro-batch came
    if graph is None:
        optimizer.zero_grad(set_to_none=True)
    else:
        graph.begin_step()
    parts = []  # f32 [5 + bottleneck] each: loss parts, then the mean teacher row
    for micro in range(accumulate):
        with span("data"):
            before = _mark(world.device)
            batch = next(batches).to(world.device, non_blocking=True)
            after = _mark(world.device)
            if before is not None and after is not None:
                arrivals.append((before, after))
        with gradient_sync(model, last=micro + 1 == accumulate):
            if graph is None:
                parts.append(_backward(model, scaler, batch, values.teacher_temp, accumulate))
            else:
                parts.append(graph(batch, values.teacher_temp))
    total = parts[0] if accumulate == 1 else torch.stack(parts).sum(0)
    # One collective for all that the ranks must agree on: the losses, the center's input, and whether to stop.
    asked = [float(flag) for flag in stop()]
    agreed = world.mean(torch.cat([total, _on_device(asked, total)]))
    total, came = agreed.split([len(total), len(asked)])
    if graph is not None:
        world.mean_gradients([p.grad for p in model.parameters() if p.grad is not None])
    with span("optimiser"):
        if update is not None:
            norm, ok = update(agreed, total[len(LOSSES) :], values, clip)
        else:
            norm, ok = apply_gradients(optimizer, scaler, values, clip, agreed)
    scale = scaler._scale if scaler.is_enabled() else None
    last = torch.stack([norm, ok, torch.zeros_like(norm) if scale is None else scale.float()])
    numbers = torch.cat([total[: len(LOSSES)], came, last]).double()
    begin = arrivals[0][1] if arrivals else None
    if update is not None and numbers.is_cuda:
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        return LaunchedStep(host, begin, _mark(world.device), arrivals[1:])
    numbers = numbers.cpu()  # waits for the device
    if update is None and numbers[-2] > 0:
        with span("EMA"):
            pera.update_center(total[len(LOSSES) :])  # before the teacher's, and in effect from the next step on
            pera.update_teacher(values.momentum)
    return LaunchedStep(numbers, begin, _mark(world.device), arrivals[1:])


def _awaited(launch: Callable[P, LaunchedStep]) -> Callable[P, StepResult]:
    def step(*args: P.args, **kwargs: P.kwargs) -> StepResult:
        return launch(*args, **kwargs).result()

    return step


train_step = _awaited(launch_step)
"""One update, of which the host waits for the end; arguments as those of ``launch_step``."""


def _mark(device: torch.device) -> torch.cuda.Event | None:
    """An event at this place of the device's current stream; None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _on_device(values: list[float], like: Tensor) -> Tensor:
    """Numbers beside a tensor, float32, without a wait."""
    if like.is_cuda:
        return torch.tensor(values, pin_memory=True).to(like.device, non_blocking=True)
    return like.new_tensor(values)


def make_graph(model: nn.Module, scaler: torch.amp.GradScaler, accumulate: int) -> StepGraph:
    """For `launch_step` on a GPU: its micro-batches as a CUDA graph, recorded at the first one."""
    return StepGraph(
        lambda batch, temp: _backward(model, scaler, batch, temp, accumulate), model.parameters(), accumulate
    )


def _backward(
    model: nn.Module, scaler: torch.amp.GradScaler, batch: StepInputs, teacher_temp: float | Tensor, accumulate: int
) -> Tensor:
    """Gradients of one micro-batch; returns its share of the step's means, f32 [5 + bottleneck]."""
    out = model(batch, teacher_temp)
    with span("backward"):
        loss = out["loss"] if accumulate == 1 else out["loss"] / accumulate
        scaler.scale(loss).backward()
    losses = torch.stack([out[name].detach().float() for name in LOSSES])
    means = torch.cat([losses, out["teacher_mean"].detach().float().flatten()])
    return means if accumulate == 1 else means / accumulate
