"""One optimiser step: micro-batches, gradients, update, center, EMA."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pera_fast.ranges import span
from pera_fast.train.distributed import World, gradient_sync
from pera_fast.train.graph import StepGraph
from pera_fast.train.optim import apply_gradients
from pera_fast.train.schedules import StepValues

LOSSES: tuple[str, ...] = ("loss", "global_cls_loss", "local_cls_loss", "koleo_loss", "pixel_loss")


@dataclass(frozen=True)
class StepResult:
    """What a step gave, on the host.

    Attributes:
        losses: total and logged parts, means over micro-batches and ranks (METHOD.md section 5).
        grad_norm: before clipping.
        applied: False if something was not finite: then parameters, teacher and center are as before.
        stop: over all ranks, whether (SIGINT, SIGTERM) came.
    """

    losses: dict[str, float]
    grad_norm: float
    applied: bool
    stop: tuple[bool, bool]

    @property
    def nonfinite(self) -> list[str]:
        """Names of what was not finite."""
        bad = [name for name, value in self.losses.items() if not math.isfinite(value)]
        if not bad and not math.isfinite(self.grad_norm):
            bad = ["gradients"]
        return bad if bad or self.applied else ["teacher_mean"]


def train_step(
    model: nn.Module,
    pera: Any,
    optimizer: torch.optim.AdamW,
    scaler: torch.amp.GradScaler,
    inputs: Iterator[Any],
    accumulate: int,
    values: StepValues,
    clip: float,
    world: World,
    stop: Callable[[], tuple[bool, bool]] = lambda: (False, False),
    graph: StepGraph | None = None,
) -> StepResult:
    """Takes `accumulate` micro-batches from `inputs` and makes one update. Reads from the device once, at its end.

    Args:
        model: called for the losses; `pera` itself, or `pera` in DDP.
        pera: the model with its center and teacher.
        stop: says whether (SIGINT, SIGTERM) came to this process; all ranks learn it, in `StepResult.stop`.
        graph: made by `make_graph`, runs the micro-batches; None: they run op by op.
    """
    optimizer.zero_grad(set_to_none=graph is None)  # a graph knows the gradients by their addresses
    parts = []  # f32 [5 + bottleneck] each: loss parts, then the mean teacher row
    for micro in range(accumulate):
        with span("data"):
            batch = next(inputs).to(world.device, non_blocking=True)
        with gradient_sync(model, last=micro + 1 == accumulate):
            if graph is None:
                parts.append(_backward(model, scaler, batch, values.teacher_temp, accumulate))
            else:
                parts.append(graph(batch, values.teacher_temp))
    total = torch.stack(parts).sum(0)
    # One collective for all that the ranks must agree on: the losses, the center's input, and whether to stop.
    total = world.mean(torch.cat([total, *(total.new_full((1,), float(flag)) for flag in stop())]))
    with span("optimiser"):
        norm, ok = apply_gradients(optimizer, scaler, values, clip, total)
    numbers = torch.cat([total[: len(LOSSES)], total[-2:], torch.stack([norm, ok])]).tolist()  # waits for the device
    applied = bool(numbers[-1])
    if applied:
        with span("EMA"):
            pera.update_center(total[len(LOSSES) : -2])  # before the teacher's, and in effect from the next step on
            pera.update_teacher(values.momentum)
    sigint, sigterm, grad_norm, _ = numbers[len(LOSSES) :]
    losses = dict(zip(LOSSES, numbers[: len(LOSSES)], strict=True))
    return StepResult(losses, grad_norm, applied, (sigint > 0, sigterm > 0))


def make_graph(model: nn.Module, scaler: torch.amp.GradScaler, accumulate: int) -> StepGraph:
    """For `train_step` on one GPU: its micro-batches as a CUDA graph, recorded at the first one."""
    return StepGraph(lambda batch, temp: _backward(model, scaler, batch, temp, accumulate), model.parameters())


def _backward(
    model: nn.Module, scaler: torch.amp.GradScaler, batch: Any, teacher_temp: float | Tensor, accumulate: int
) -> Tensor:
    """Gradients of one micro-batch; returns its share of the step's means, f32 [5 + bottleneck]."""
    out = model(batch, teacher_temp)
    with span("backward"):
        scaler.scale(out["loss"] / accumulate).backward()
    losses = torch.stack([out[name].detach().float() for name in LOSSES])
    return torch.cat([losses, out["teacher_mean"].detach().float().flatten()]) / accumulate
