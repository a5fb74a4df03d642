"""Counts the work of a training step on a GPU, by running the trainer's own step on fake tensors."""

from __future__ import annotations

import importlib.util
from itertools import repeat

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pera_fast.config import Config
from pera_fast.model.inputs import StepInputs
from pera_fast.model.pera import PerA
from pera_fast.profile.batches import blank_batch
from pera_fast.profile.on_gpu import GPU, on_gpu
from pera_fast.profile.simulate import VALUES, copies
from pera_fast.profile.work import Counting, Work
from pera_fast.ranges import listening
from pera_fast.train.compute_copies import make_copies
from pera_fast.train.distributed import World
from pera_fast.train.fused_update import make_update
from pera_fast.train.graph import StepGraph
from pera_fast.train.inputs import make_inputs
from pera_fast.train.optim import make_optimizer, make_scaler
from pera_fast.train.step import launch_step, make_graph

HOPPER, OTHERS = (9, 0), (8, 9)
"""Compute capabilities of which steps are counted: kernels are chosen by what was measured on the first; no other has
measurements, so that one stands for all. What else a kernel's launch depends on is taken from an H200."""
MULTIPROCESSORS, L2_BYTES = 132, 50 << 20


def why_not() -> str | None:
    """Why a step's work cannot be counted here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "counting a step's launches needs Triton, which is not installed"
    return None


class _Inline(StepGraph):
    """Runs a step graph's function where the graph would be replayed, from the batches as they come."""

    def __init__(self, graph: StepGraph, optimizer: torch.optim.AdamW) -> None:
        super().__init__(graph.backward, (), accumulate=1)
        self._optimizer = optimizer

    def begin_step(self) -> None:
        """Drop the gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def __call__(self, batch: StepInputs, teacher_temp: float) -> Tensor:
        """The result of a micro-batch."""
        return self.backward(batch, torch.full((), teacher_temp, device=GPU))


def count_kernels(cfg: Config, capability: tuple[int, int] = HOPPER) -> dict[str, tuple[int, int]]:
    """Launches and bytes of each Triton kernel in a step, by name: what its launches get, each tensor once.

    Args:
        cfg: as for ``count_step``.
        capability: compute capability of the GPU.
    """
    return _count(cfg, 1, True, capability).by_kernel


def count_step(cfg: Config, world_size: int = 1, opened: bool = False, capability: tuple[int, int] = HOPPER) -> Work:
    """Work of a training step of a configuration on one of some GPUs.

    Args:
        cfg: resolved configuration; the batch is that of one device and micro-batch. ``model.recompute=auto`` is
            "none", what it takes where memory is no limit.
        world_size: data-parallel processes, which exchange gradients.
        opened: look what ops launch rather than what they say.
        capability: compute capability of the GPUs.
    """
    return _count(cfg, world_size, opened, capability).work


def _count(cfg: Config, world_size: int, opened: bool, capability: tuple[int, int]) -> Counting:
    plan = cfg.train.resolve_batch(1)
    real = make_inputs(blank_batch(cfg, plan.per_device), cfg)
    with torch.device("meta"):
        model = PerA(cfg)
    if cfg.model.recompute == "auto":
        model.recompute = "none"
    fake, counting = FakeTensorMode(allow_non_fake_inputs=True), Counting(opened)
    gpu = on_gpu(
        capability, MULTIPROCESSORS, L2_BYTES, counting.launched, lambda t: counting.exchanged(t, world_size)
    )  # fmt: skip
    with fake, counting, gpu, listening(counting.label):
        model = model.to_empty(device="cpu")
        make_copies(model)
        optimizer, scaler = make_optimizer(model.parameters(), cfg), make_scaler(cfg, GPU)
        inputs, update = copies(real, fake), make_update(model, optimizer, scaler)
        assert update is not None, "Triton runs: why_not"
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.empty_like(parameter)
        update(torch.zeros(1), torch.zeros(cfg.model.bottleneck), VALUES, cfg.optim.clip)  # makes AdamW's state
        counting.begin(update.traffic())
        graph = _Inline(make_graph(model, scaler, plan.accumulate), optimizer)
        launch_step(
            *(model, model, optimizer, scaler, repeat(inputs), plan.accumulate, VALUES, cfg.optim.clip),
            World(0, world_size, GPU), graph=graph, update=update,
        )  # fmt: skip
    return counting
