"""Worker process of the profile (``python -m pera_fast.profile.measure``): points on stdin, results on stdout.

A real point has a process of its own: its peak is its own, and running out of memory ends nothing else.
"""

from __future__ import annotations

import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import repeat

import torch

from pera_fast.config import Config
from pera_fast.model.inputs import StepInputs
from pera_fast.profile.batches import random_inputs
from pera_fast.profile.points import Point
from pera_fast.profile.simulate import VALUES, simulate_step
from pera_fast.train.api import make_model
from pera_fast.train.attention import prefer_attention
from pera_fast.train.compute_copies import make_copies
from pera_fast.train.distributed import World
from pera_fast.train.flops import device_peak, flops_per_image
from pera_fast.train.fused_update import make_update
from pera_fast.train.graph import choose_graph
from pera_fast.train.host_memory import reuse_freed_memory
from pera_fast.train.memory_plan import choose_recompute
from pera_fast.train.optim import make_optimizer, make_scaler
from pera_fast.train.step import LaunchedStep, launch_step, make_graph
from pera_fast.train.teacher_precision import check_teacher_precision

WARM_UP = 3  # steps: the first makes AdamW's state, kernels are compiled and chosen


def measure(point: Point) -> Point:
    """The point with what was found; out of memory is a finding too."""
    began = time.perf_counter()
    cfg = point.variant.config(point.batch_size)
    found = replace(point, status="ok", flops_per_image=flops_per_image(cfg))
    try:
        if point.device == "simulate":
            memory = simulate_step(cfg)
            found.peak = found.reserved = memory.peak
            found.between_steps, found.at_peak = memory.between_steps, memory.at_peak
            _predict(cfg, found)
        else:
            _real_steps(cfg, torch.device(point.device), found)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        found = replace(point, status="out of memory", note=str(error).strip().splitlines()[0][:200])
    found.took = time.perf_counter() - began
    return found


def _predict(cfg: Config, found: Point) -> None:
    """Fill in the step's work on a GPU and its time on named cards, where Triton is there to count it."""
    from pera_fast.profile.count import OTHERS, count_step, why_not
    from pera_fast.profile.predict import predictions

    if reason := why_not():
        found.note = f"no predicted times: {reason}"
        return
    work = count_step(cfg, found.world_size)
    found.launches, found.bytes = int(work.total("launches")), int(work.total("bytes"))
    found.flops, found.work = work.total("flops"), work.parts()
    others = count_step(cfg, found.world_size, capability=OTHERS)
    found.predicted = predictions(work, others, cfg, found.world_size)


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's allocator has an error of its own; the CPU's says it in a RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return "can't allocate memory" in text or "not enough memory" in text or "CUDA out of memory" in text


def real_step(
    cfg: Config, device: torch.device, batches: Iterator[StepInputs] | None = None
) -> Callable[[], LaunchedStep]:
    """The trainer's step on random crops that lie on the device already; every call launches one optimiser step.

    On a GPU the host does not wait for it: synchronise before reading a clock.
    """
    if device.type == "cpu":
        reuse_freed_memory()
    plan = cfg.train.resolve_batch(1)
    if batches is None:
        batches = repeat(random_inputs(cfg, plan.per_device).to(device))
    prefer_attention(cfg, device)
    check_teacher_precision(cfg, device)
    model = make_model(cfg).to(device)
    model.recompute = choose_recompute(cfg, model, device, plan.per_device).policy
    make_copies(model)
    optimizer, scaler = make_optimizer(model.parameters(), cfg), make_scaler(cfg, device)
    graph = make_graph(model, scaler, plan.accumulate) if choose_graph(cfg, device).use else None
    world, update = World(0, 1, device), make_update(model, optimizer, scaler)

    def step() -> LaunchedStep:
        return launch_step(
            *(model, model, optimizer, scaler, batches, plan.accumulate, VALUES, cfg.optim.clip, world),
            graph=graph, update=update,
        )  # fmt: skip

    return step


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _real_steps(cfg: Config, device: torch.device, found: Point) -> None:
    step, seconds = real_step(cfg, device), []
    for _ in range(min(WARM_UP, max(found.steps, 1))):
        step()
    if device.type == "cuda":
        synchronize(device)
        gc.collect()
        found.between_steps = torch.cuda.memory_allocated(device)
    for _ in range(found.steps):
        synchronize(device)
        start = time.perf_counter()
        step()  # reads the losses: returns when the device is done with them
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    found.step_seconds = [statistics.median(seconds), min(seconds), max(seconds)]
    found.images_per_s = cfg.train.resolve_batch(1).total / found.step_seconds[0]
    peak = device_peak(device, cfg.train.precision)
    found.mfu = None if peak is None else found.images_per_s * found.flops_per_image / peak
    if device.type == "cuda":
        found.peak, found.reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        free, total = torch.cuda.mem_get_info(device)
        found.outside = total - free - torch.cuda.memory_reserved(device)
    else:
        found.peak = found.reserved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Reads points from stdin, one a line, and writes each back as a line of stdout with what was found."""
    for line in sys.stdin:
        print(json.dumps(measure(Point.from_json(json.loads(line))).to_json()), flush=True)


if __name__ == "__main__":
    main()
