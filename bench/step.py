"""A whole training step, ours and, where PERA_OFFICIAL names a checkout of it, the published implementation's.

    python bench/step.py --recipe vit_b16 --batch-size 8 --out bench/results

Both sides in one process, one after the other, same sizes, batch and precision; ours begins at uint8 crops with jitter
(it colours, normalises and unfolds inside the step), theirs at float views that are ready. Prints a table, writes JSON.
"""

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from conftest import _commit, _processor, synchronize
from published import PublishedStep

from pera_fast.config import Config, load_config
from pera_fast.data.batch import ColorParams
from pera_fast.model.inputs import StepInputs
from pera_fast.model.pera import PRECISIONS, PerA
from pera_fast.profile.live import blank_batch
from pera_fast.train.distributed import World
from pera_fast.train.flops import flops_per_image
from pera_fast.train.inputs import make_inputs
from pera_fast.train.optim import make_optimizer, make_scaler
from pera_fast.train.schedules import StepValues
from pera_fast.train.step import train_step

VALUES = StepValues(lr=1e-4, weight_decay=0.04, momentum=0.99, teacher_temp=0.04)


def jittered_inputs(cfg: Config, batch_size: int) -> StepInputs:
    """Random crops with the recipe's share of coloured views."""
    batch = blank_batch(cfg, batch_size)
    generator = torch.Generator().manual_seed(0)
    for group in (batch.global_, batch.local):
        group.pixels.random_(0, 256, generator=generator)
        n = group.pixels.shape[0]
        group.student, group.teacher = (_colours(n, share, generator) for share in (0.72, 0.1))
    return make_inputs(batch, cfg)


def _colours(n: int, share: float, generator: torch.Generator) -> ColorParams:
    order = torch.rand(n, 4, generator=generator).argsort(1).int()
    order[torch.rand(n, generator=generator) >= share] = -1
    factors = 0.8 + 0.4 * torch.rand(n, 4, generator=generator)
    factors[:, 3] = 0.2 * torch.rand(n, generator=generator) - 0.1
    return ColorParams(order, factors)


def ours(cfg: Config, device: torch.device) -> Callable[[], Any]:
    """Our step as the trainer runs it."""
    batch_size = cfg.train.resolve_batch(1).per_device
    inputs = jittered_inputs(cfg, batch_size)
    model = PerA(cfg).to(device)
    optimizer, scaler = make_optimizer(model.parameters(), cfg), make_scaler(cfg, device)
    world = World(0, 1, device)

    def forever():
        while True:
            yield inputs

    return lambda: train_step(model, model, optimizer, scaler, forever(), 1, VALUES, cfg.optim.clip, world)


def theirs(cfg: Config, device: torch.device, checkout: Path) -> Callable[[], Any]:
    """The published step."""
    side = PublishedStep(checkout, cfg, device)
    views = side.views(cfg.train.resolve_batch(1).per_device, device)
    dtype = PRECISIONS[cfg.train.precision]
    return lambda: float(side.step(views, dtype, VALUES.teacher_temp, VALUES.momentum))


def measure(make: Callable[[], Callable[[], Any]], device: torch.device, steps: int) -> dict[str, float]:
    """Median and spread of some steps after one to warm up, and the most memory of device or process."""
    step, seconds = make(), []
    for _ in range(1 + steps):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    seconds = sorted(seconds[1:])
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_rss()
    return {
        "median_s": statistics.median(seconds),
        "min_s": seconds[0],
        "max_s": seconds[-1],
        "peak_mib": memory / 2**20,
    }


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="vit_b16")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", default="bf16", choices=list(PRECISIONS))
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that warms up")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recompute", default=None, help="none, cheap or block; default: the recipe's")
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    args = parser.parse_args()
    device = torch.device(args.device)
    overrides = [f"train.batch_size={args.batch_size}", f"train.precision={args.precision}"]
    overrides += [f"model.recompute={args.recompute}"] if args.recompute else []
    cfg = load_config(args.recipe, overrides)
    sides: dict[str, Callable[[], Callable[[], Any]]] = {"pera-fast": lambda: ours(cfg, device)}
    if checkout := os.environ.get("PERA_OFFICIAL"):
        sides["published"] = lambda: theirs(cfg, device, Path(checkout))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    record: dict[str, Any] = {
        "bench": "step",
        "recipe": args.recipe,
        "batch_size": args.batch_size,
        "precision": args.precision,
        "recompute": cfg.model.recompute,
        "device": name,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": date.today().isoformat(),
        "file_kind": "cpu" if device.type == "cpu" else name.lower().replace(" ", "-"),
        "gflop_per_image": flops_per_image(cfg) / 1e9,
        "sides": {},
    }
    print(f"{args.recipe}, batch {args.batch_size}, {args.precision}, {name}, {torch.get_num_threads()} threads")
    for side, make in sides.items():
        found = measure(make, device, args.steps)
        gc.collect()
        found["images_per_s"] = args.batch_size / found["median_s"]
        found["gflops"] = found["images_per_s"] * record["gflop_per_image"]
        record["sides"][side] = found
        print(
            f"{side:<10} {found['images_per_s']:8.3f} images/s   {found['median_s']:8.3f} s a step"
            f" ({found['min_s']:.3f} to {found['max_s']:.3f})   peak {found['peak_mib']:.0f} MiB",
            flush=True,
        )
    if "published" in record["sides"]:
        record["speedup"] = record["sides"]["pera-fast"]["images_per_s"] / record["sides"]["published"]["images_per_s"]
        print(f"ratio {record['speedup']:.2f}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        kind = record["file_kind"]
        path = args.out / f"step-{args.recipe}-b{args.batch_size}-{args.precision}-{kind}.json"
        path.write_text(json.dumps(record, indent=2) + "\n")
        print(path)


if __name__ == "__main__":
    main()
