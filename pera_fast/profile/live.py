"""Live memory of a training step, without running it: FakeTensor storages counted from birth to death.

A fake tensor has a shape, a dtype and a storage that holds no bytes but dies when the last tensor on it dies. Counting
storages by lifetime gives the memory that the step's tensors need, with no allocator's rounding, no workspace of a
library and no CUDA context. Ops of ``pera_kernels`` are opened: the temporaries of their PyTorch implementation count.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pera_fast.config import Config
from pera_fast.data.batch import Batch, ColorParams, CropGroup
from pera_fast.model.inputs import StepInputs
from pera_fast.model.pera import PerA
from pera_fast.train.inputs import make_inputs
from pera_fast.train.optim import make_optimizer
from pera_kernels import backend

MIB = 2**20


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that ops return, by the phase in which each was born.

    Attributes:
        live: bytes alive now.
        peak: the most that were alive at once since the last ``reset_peak``.
        by_phase: bytes alive now by phase of birth.
        peak_by_phase: the same at the peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.by_phase: dict[str, int] = {}
        self.peak_by_phase: dict[str, int] = {}
        self._phase = "other"
        self._alive: dict[int, weakref.ref] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Storages born inside are counted under this name."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak, self.peak_by_phase = self.live, dict(self.by_phase)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size, phase = id(storage), storage.nbytes(), self._phase
        if key in self._alive:
            return

        def died(_: Any) -> None:
            self.live -= size
            self.by_phase[phase] -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, died)
        self.live += size
        self.by_phase[phase] = self.by_phase.get(phase, 0) + size
        if self.live > self.peak:
            self.peak, self.peak_by_phase = self.live, dict(self.by_phase)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = self._run(func, args, kwargs or {})
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._count(value)
        return out

    def _run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        definition = OPDEFS.get(func._schema.name) if func.namespace == "pera" else None
        if definition is None:
            return func(*args, **kwargs)
        try:
            with self:
                return definition._init_fn(*args, **kwargs)
        except DataDependentOutputException:  # checks of values: then the op's result counts, its temporaries do not
            return func(*args, **kwargs)


@dataclass
class StepMemory:
    """Memory of one training step after the first, in bytes.

    Attributes:
        batch_size: images.
        peak: most bytes alive at once.
        between_steps: bytes that stay alive between steps: weights, optimiser state, center, inputs.
        at_peak: bytes alive at the peak by what they belong to.
    """

    batch_size: int
    peak: int
    between_steps: int
    at_peak: dict[str, int] = field(default_factory=dict)


def simulate_step(cfg: Config) -> StepMemory:
    """Peak live bytes of a training step of a configuration, on fake CPU tensors.

    Args:
        cfg: resolved configuration; the batch is that of one device and micro-batch.

    Returns:
        The memory of any step but a run's first, which begins without AdamW's state.
    """
    batch_size = cfg.train.resolve_batch(1).per_device
    real = make_inputs(blank_batch(cfg, batch_size), cfg)
    with torch.device("meta"):
        model = PerA(cfg)
    # allow_non_fake_inputs: scalars that ops make of Python numbers, and the meta parameters on their way here
    fake, count = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
    # Compiled kernels cannot run on fake tensors; what they hold is at most what the PyTorch implementations hold.
    with backend.without("native", "triton"), fake, count:
        with count.phase("weights"):
            model = model.to_empty(device="cpu")
        optimizer = make_optimizer(model.parameters(), cfg)
        with count.phase("inputs"):
            inputs = _copies(real, fake)
        with count.phase("optimizer state"):
            _make_state(optimizer)
        between = count.live
        count.reset_peak()
        _fake_step(model, optimizer, inputs, count, cfg.optim.clip)
    return StepMemory(batch_size, count.peak, between, count.peak_by_phase)


def _make_state(optimizer: torch.optim.AdamW) -> None:
    """AdamW makes its state in the first step."""
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _fake_step(model: PerA, optimizer: torch.optim.AdamW, inputs: StepInputs, count: LiveBytes, clip: float) -> None:
    """The order of ``pera_fast.train.step``, without its read of the losses."""
    with count.phase("activations"):
        out = model(inputs, 0.05)
    with count.phase("gradients"):
        out["loss"].backward()
    teacher_mean = out["teacher_mean"]
    del out
    with count.phase("update"):
        trained = optimizer.param_groups[0]["params"]
        torch.nn.utils.clip_grad_norm_(trained, clip, foreach=True)
        optimizer.step()
        model.update_center(teacher_mean)
        model.update_teacher(0.99)
    optimizer.zero_grad(set_to_none=True)


def _copies(inputs: StepInputs, fake: FakeTensorMode) -> StepInputs:
    def copy(tensor: Tensor) -> Tensor:
        return torch.empty_like(fake.from_tensor(tensor))  # an op, so that it is counted

    keep = None if inputs.keep is None else copy(inputs.keep)
    return StepInputs(inputs.global_.apply(copy), inputs.local.apply(copy), keep)


def blank_batch(cfg: Config, batch_size: int) -> Batch:
    """A batch of black crops whose colour parameters change nothing, in the shapes of a configuration."""
    views = cfg.views
    groups = []
    for crops, size in ((views.num_global, views.global_size), (views.num_local, views.local_size)):
        n = crops * batch_size
        pixels = torch.zeros(n, size, size, cfg.model.in_chans, dtype=torch.uint8)
        colours = ColorParams(
            torch.full((n, 4), -1, dtype=torch.int32), torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(n, 1)
        )
        groups.append(CropGroup(pixels, colours, colours))
    return Batch(micro_step=0, epoch=0, samples=np.arange(batch_size), global_=groups[0], local=groups[1])


@dataclass(frozen=True)
class MemoryFit:
    """peak = fixed + slope * batch, in MiB."""

    fixed: float
    slope: float

    def largest_batch(self, gib: float) -> int:
        """Largest batch whose predicted peak fits a card of so many GiB."""
        return max(int((gib * 1024 - self.fixed) // self.slope), 0)


def fit(first: StepMemory, second: StepMemory) -> MemoryFit:
    """The line through two batch sizes."""
    slope = (second.peak - first.peak) / (second.batch_size - first.batch_size)
    return MemoryFit((first.peak - slope * first.batch_size) / MIB, slope / MIB)
