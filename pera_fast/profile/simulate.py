"""Simulates the memory of a training step on fake tensors, by owner, without a GPU and within seconds."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from itertools import repeat

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from pera_fast.config import Config
from pera_fast.model.inputs import StepInputs
from pera_fast.model.pera import PerA
from pera_fast.profile.batches import blank_batch
from pera_fast.profile.live import Label, LiveBytes, reads_value
from pera_fast.ranges import listening
from pera_fast.train.distributed import World
from pera_fast.train.inputs import make_inputs
from pera_fast.train.optim import make_optimizer, make_scaler
from pera_fast.train.schedules import StepValues
from pera_fast.train.step import train_step
from pera_kernels import backend
from pera_kernels.products import half_products

VALUES = StepValues(lr=1e-4, weight_decay=0.04, momentum=0.99, teacher_temp=0.04)
CPU = torch.device("cpu")
_OPENED: dict[Hashable, int] = {}  # temporaries of ops by their arguments' shapes, for all simulations of this process


@dataclass
class StepMemory:
    """Memory of one training step after the first, in bytes.

    Attributes:
        batch_size: images of a micro-batch.
        peak: most bytes alive at once.
        between_steps: bytes that stay alive between steps: weights, optimiser state, center, inputs.
        at_peak: bytes alive at the peak by what they belong to: see ``part``.
    """

    batch_size: int
    peak: int
    between_steps: int
    at_peak: dict[str, int] = field(default_factory=dict)


class _Step(LiveBytes):
    """Answers 1 where the step reads from the device (all is finite), and knows the weights' narrow copies."""

    def __init__(self) -> None:
        super().__init__(_OPENED)
        self.copies: dict[int, Label] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if reads_value(func):
            return 1.0
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if not func._schema.returns and func._schema.is_mutable:  # AdamW, EMA: they make nothing, and are slow to fake
            return None
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten._to_copy.default and self._is_weight(args[0]):
            number = self.number(out)
            if number is not None:
                self.copies[number] = ("weight copies",)
        return out

    def _is_weight(self, tensor: Tensor) -> bool:
        number = self.number(tensor)
        return number is not None and self.births[number][1][:1] == ("weights",)


def simulate_step(cfg: Config) -> StepMemory:
    """Peak live bytes of a training step of a configuration, on fake CPU tensors.

    Runs ``pera_fast.train.step.train_step`` itself, on weights, optimiser state and inputs that hold no bytes.

    Args:
        cfg: resolved configuration; the batch is that of one device and micro-batch.

    Returns:
        The memory of any step but a run's first, which begins without AdamW's state.
    """
    plan = cfg.train.resolve_batch(1)
    real = make_inputs(blank_batch(cfg, plan.per_device), cfg)
    with torch.device("meta"):
        model = PerA(cfg)
    # allow_non_fake_inputs: scalars that ops make of Python numbers, and the meta parameters on their way here
    fake, count = FakeTensorMode(allow_non_fake_inputs=True), _Step()
    # Compiled kernels cannot run on fake tensors; what they hold is at most what the PyTorch implementations hold.
    with backend.without("native", "triton"), half_products(), fake, count, listening(count.label):
        with count.label("weights"):
            model = model.to_empty(device="cpu")
        with count.label("weight copies"):
            model.make_fp8()
        optimizer, scaler = make_optimizer(model.parameters(), cfg), make_scaler(cfg, CPU)
        with count.label("optimiser state"):
            _make_state(optimizer)
        with count.label("crops"):
            inputs = copies(real, fake)
        between, since = count.live, len(count.events)
        world = World(0, 1, CPU)
        train_step(
            model, model, optimizer, scaler, repeat(inputs), plan.accumulate, VALUES, cfg.optim.clip, world
        )  # fmt: skip
        trained: list[Tensor] = optimizer.param_groups[0]["params"]
        numbers = (count.number(p.grad) for p in trained if p.grad is not None)
        gradients: dict[int, Label] = {n: ("gradients",) for n in numbers if n is not None}
        peak, alive = count.peak(since)
        at_peak = _sum_parts(count.by_label(alive, {**count.copies, **gradients}))
    return StepMemory(plan.per_device, peak, between, at_peak)


def _make_state(optimizer: torch.optim.AdamW) -> None:
    """AdamW makes its state in the first step."""
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def part(label: Label) -> str:
    """Owner of a storage, from a label as the spans of model and step give it.

    Between steps: weights, optimiser state, crops (and indices, colours). Made by a step: gradients (of parameters),
    weight copies (in the compute dtype), and by module: student ..., teacher, loss. What the backward pass makes on its
    way (gradients of activations, activations made again) is backward; clipping, AdamW and EMA are update.
    """
    first = label[0] if label else "other"
    if first == "student":
        return f"student {label[1]}" if len(label) > 1 else "student stream"
    return {"optimiser": "update", "EMA": "update", "data": "crops"}.get(first, first)


def _sum_parts(labels: Mapping[Label, int]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for label, size in labels.items():
        sums[part(label)] = sums.get(part(label), 0) + size
    return sums


def copies(inputs: StepInputs, fake: FakeTensorMode) -> StepInputs:
    """Fake inputs of the shapes of real ones."""

    def copy(tensor: Tensor) -> Tensor:
        return torch.empty_like(fake.from_tensor(tensor))  # an op, so that it is counted

    return inputs.apply(copy)
