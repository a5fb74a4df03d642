"""A whole training step; where PERA_OFFICIAL names a checkout of it, the published implementation's in the same run.

Ours begins at uint8 crops with jitter (it colours, normalises and unfolds inside the step) and ends with what is logged
on the host; theirs begins at float views that are ready. Both: forward, backward, clipping, AdamW, center, EMA. The
cases are what our backward pass makes again; the published one keeps everything, whatever the case. `compiled` is the
trainer with train.compile: its blocks by torch.compile; `no graph` without its CUDA graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pera_bench.point import Point
from pera_bench.work import Cost, Unavailable, Whole
from pera_fast.config import Config
from pera_fast.model.pera import PRECISIONS
from pera_fast.profile.measure import real_step
from pera_fast.profile.simulate import VALUES
from pera_fast.train.flops import flops_per_image
from pera_kernels import backend
from pera_kernels.attention import xformers

ATTENTION = ("triton", "amx", "cudnn", "xformers", "varlen", "sdpa")
GRAPHS = ("no graph", "compiled")
IMPLEMENTATIONS = (
    "reference",
    *GRAPHS,
    "pera-fast",
    *(f"attention={name}" for name in ATTENTION),
    "published",
)
CASES = dict.fromkeys(("none", "cheap", "block"), ("step",))


def make(point: Point, case: str) -> Whole:
    """FLOPs are those that the method needs: recomputation does not count."""
    cfg = replace(point.cfg, model=replace(point.cfg.model, recompute=case))

    def ours(**train: Any) -> Callable[[], Callable[[], Any]]:
        return lambda: real_step(replace(cfg, train=replace(cfg.train, **train)), point.device)

    made: dict[str, Any] = {"pera-fast": ours(), "reference": (ours(), "reference"), "compiled": ours(compile=True)}
    if point.device.type == "cuda":
        made["no graph"] = ours(cuda_graph="false")
    made |= {f"attention={name}": (ours(), name) for name in ATTENTION if _attention_runs(name, point.device)}
    made["published"] = lambda: published_step(cfg, point.device)
    # On a GPU it is made for xFormers' attention; where that does not run, the row says what took its place.
    instead = point.device.type == "cuda" and xformers.available(point.device) is not None
    labels = {"published": "published, sdpa"} if instead else {}
    return Whole(made, Cost(flops=int(flops_per_image(cfg) * point.images)), labels)


def _attention_runs(name: str, device: torch.device) -> bool:
    with backend.use(name):
        try:
            return backend.choose("attention", device) == name
        except RuntimeError:
            return False


def published_step(cfg: Config, device: torch.device) -> Callable[[], Any]:
    """The published implementation's step."""
    checkout = os.environ.get("PERA_OFFICIAL")
    if not checkout:
        raise Unavailable("PERA_OFFICIAL names no checkout of the published implementation")
    from pera_bench.published import PublishedStep

    side = PublishedStep(Path(checkout), cfg, device)
    views = side.views(cfg.train.resolve_batch(1).per_device, device)
    return lambda: float(side.step(views, PRECISIONS[cfg.train.precision], VALUES.teacher_temp, VALUES.momentum))
