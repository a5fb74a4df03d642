"""A whole training step; where PERA_OFFICIAL names a checkout of it, the published implementation's in the same run.

Ours begins at uint8 crops with jitter (it colours, normalises and unfolds inside the step) and ends with what is logged
on the host; theirs begins at float views that are ready. Both: forward, backward, clipping, AdamW, center, EMA. The
cases are what is recomputed in the backward pass; `published` keeps everything, so it is in case `none` alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from pera_bench.point import Point
from pera_bench.work import Cost, Unavailable, Whole
from pera_fast.config import Config
from pera_fast.profile.batches import random_inputs
from pera_fast.train.api import make_model
from pera_fast.train.distributed import World
from pera_fast.train.flops import flops_per_image
from pera_fast.train.optim import make_optimizer, make_scaler
from pera_fast.train.schedules import StepValues
from pera_fast.train.step import train_step
from pera_kernels import backend

ATTENTION = ("triton", "xformers", "varlen", "sdpa")
IMPLEMENTATIONS = ("reference", "compiled", "pera-fast", *(f"attention={name}" for name in ATTENTION), "published")
CASES = dict.fromkeys(("none", "cheap", "block"), ("step",))
VALUES = StepValues(lr=1e-4, weight_decay=0.04, momentum=0.99, teacher_temp=0.04)


def make(point: Point, case: str) -> Whole:
    """FLOPs are those that the method needs: recomputation does not count."""
    cfg = replace(point.cfg, model=replace(point.cfg.model, recompute=case))

    def ours(compiled: bool = False) -> Callable[[], Callable[[], Any]]:
        return lambda: our_step(replace(cfg, train=replace(cfg.train, compile=compiled)), point)

    made: dict[str, Any] = {"pera-fast": ours(), "reference": (ours(), "reference"), "compiled": ours(compiled=True)}
    made |= {f"attention={name}": (ours(), name) for name in ATTENTION if _attention_runs(name, point.device)}
    if case == "none":
        made["published"] = lambda: published_step(cfg, point.device)
    return Whole(made, Cost(flops=int(flops_per_image(cfg) * point.images)))


def _attention_runs(name: str, device: torch.device) -> bool:
    with backend.use(name):
        try:
            return backend.choose("attention", device) == name
        except RuntimeError:
            return False


def our_step(cfg: Config, point: Point) -> Callable[[], Any]:
    """The trainer's step on one batch that stays on the device."""
    inputs = repeat(random_inputs(cfg, point.images).to(point.device))
    model = make_model(cfg).to(point.device)
    optimizer, scaler = make_optimizer(model.parameters(), cfg), make_scaler(cfg, point.device)
    world = World(0, 1, point.device)
    return lambda: train_step(model, model, optimizer, scaler, inputs, 1, VALUES, cfg.optim.clip, world)


def published_step(cfg: Config, device: torch.device) -> Callable[[], Any]:
    """The published implementation's step."""
    checkout = os.environ.get("PERA_OFFICIAL")
    if not checkout:
        raise Unavailable("PERA_OFFICIAL names no checkout of the published implementation")
    from pera_bench.published import PublishedStep

    side = PublishedStep(Path(checkout), cfg, device)
    views = side.views(cfg.train.resolve_batch(1).per_device, device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[cfg.train.precision]
    return lambda: float(side.step(views, dtype, VALUES.teacher_temp, VALUES.momentum))
