"""Measure one thing of a training step on a GPU, in a process of its own: `python -m pera_bench.quick PART ...`.

    step --batch 64 [--set KEY=VALUE ...] [--backend NAME]      the trainer's step on random crops
    published --batch 64 --checkout DIR                         the published implementation's
    trace --batch 64 --csv FILE                                 every kernel of a step: ms, launches, name
    pretrain --batch 64                                         a run from JPEG files of 512 px

Prints one line of JSON: what was measured, device and versions. Imports no more than the trainer's step does.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pera_bench.ceilings import copy_bandwidth
from pera_bench.timing import clock
from pera_fast.config import Config, load_config
from pera_fast.model.pera import PRECISIONS
from pera_fast.profile.count import count_kernels
from pera_fast.profile.measure import real_step
from pera_fast.profile.simulate import VALUES
from pera_fast.train.flops import device_peak, flops_per_image
from pera_kernels import backend

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
SCENES = 512  # images of a run from files


def machine(device: torch.device) -> dict[str, str]:
    """Device, versions and commit."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    versions = {"torch": torch.__version__, "cudnn": str(torch.backends.cudnn.version())}
    return {"device": name, **versions, "commit": commit, "date": time.strftime("%Y-%m-%d")}


def times(step: Callable[[], Any], device: torch.device, warm_up: int, rounds: int, steps: int) -> dict[str, float]:
    """Milliseconds a step: median, least and most of some rounds of several steps, the host waiting between rounds."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(warm_up):
        step()
    wait()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        found.append(1000 * (time.perf_counter() - start) / steps)
    return {"ms": statistics.median(found), "ms_min": min(found), "ms_max": max(found)}


def memory(device: torch.device) -> dict[str, int]:
    """Peak MiB that tensors took, and that the allocator holds, a graph's pool included."""
    if device.type != "cuda":
        return {}
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.memory_reserved(device)
    return {"peak_mib": allocated // MIB, "reserved_mib": reserved // MIB}


def _config(args: argparse.Namespace) -> Config:
    settings = [f"train.batch_size={args.batch}", f"train.precision={args.precision}", *args.set]
    return load_config(args.recipe, settings)


def measure_step(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The trainer's step."""
    cfg = _config(args)
    with backend.use(args.backend) if args.backend else nullcontext():
        found = times(real_step(cfg, device), device, 3, args.rounds, args.steps)
    rate = 1000 * args.batch / found["ms"]
    peak = device_peak(device, args.precision)
    mfu = None if peak is None else rate * flops_per_image(cfg) / peak
    return {**found, "images_per_s": rate, "mfu": mfu, **memory(device)}


def measure_published(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The published implementation's step."""
    from pera_bench.published import PublishedStep
    from pera_kernels.attention import xformers

    cfg = _config(args)
    side = PublishedStep(args.checkout, cfg, device)
    views, dtype = side.views(args.batch, device), PRECISIONS[args.precision]
    found = times(
        lambda: side.step(views, dtype, VALUES.teacher_temp, VALUES.momentum), device, 3, args.rounds, args.steps
    )
    reason = xformers.available(device)
    attention = "xformers" if reason is None else f"sdpa, as {reason}"
    return {**found, "images_per_s": 1000 * args.batch / found["ms"], "attention": attention, **memory(device)}


def measure_trace(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Kernels of a step by name, written to a CSV file: ms a step, launches a step, name; and the copy bandwidth."""
    step = real_step(_config(args), device)
    for _ in range(4):
        step()
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(args.steps):
            step()
        torch.cuda.synchronize(device)
    kernels: dict[str, list[float]] = {}
    for event in profile.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels.setdefault(event.name, []).append(event.device_time / 1000)
    rows = sorted(((sum(ms) / args.steps, len(ms) / args.steps, name) for name, ms in kernels.items()), reverse=True)
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    with args.csv.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("ms_per_step", "launches_per_step", "kernel"))
        writer.writerows((f"{ms:.4f}", f"{count:.1f}", name) for ms, count, name in rows)
    copy = copy_bandwidth(device, clock(device))
    total = {"busy_ms": sum(row[0] for row in rows), "launches": sum(row[1] for row in rows)}
    return {**total, "copy": copy, "capability": torch.cuda.get_device_capability(device)}


def count_traced(line: dict[str, Any]) -> dict[str, Any]:
    """Launches and bytes of each Triton kernel of a traced step, as ``pera_fast.profile`` counts them on any machine.

    Args:
        line: of the trace.
    """
    settings = [f"train.batch_size={line['batch']}", f"train.precision={line['precision']}", *line["settings"]]
    try:
        return {"counted": count_kernels(load_config(line["recipe"], settings), tuple(line["capability"]))}
    except Exception as error:  # whatever is wrong here, the kernels were traced
        return {"uncounted": f"{type(error).__name__}: {error}"}


def measure_pretrain(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Runs of the trainer from files, as it comes and, on a GPU, with either decoder by name ("decoders").

    The scenes are drawn before, ``SCENES`` of them, each decoded anew in every epoch. Each run is written when it ends,
    as the time may be over before the next one has.
    """
    from pera_fast.procedural.scenes import CLASSES, write_scenes

    with tempfile.TemporaryDirectory(prefix="pera-bench-") as scratch:
        images = Path(scratch) / "images"
        write_scenes(images, -(-max(SCENES, 2 * args.batch) // len(CLASSES)), size=512)
        found: dict[str, Any] = {**_run_from_files(args, device, images, Path(scratch) / "run")}
        for decoder in ("cpu", "gpu") if device.type == "cuda" else ():
            _write(args.json, {**_what(args), **found, **machine(device)})
            run = _run_from_files(args, device, images, Path(scratch) / decoder, f"data.decode_on={decoder}")
            found.setdefault("decoders", {})[decoder] = run
    return found


def _run_from_files(
    args: argparse.Namespace, device: torch.device, images: Path, out: Path, *overrides: str
) -> dict[str, float]:
    """Medians of a run's later half, when every kernel is compiled and the files are read.

    "host_ms" is the host's time to launch a step, "host_waited_ms" what of it waited for the loader: a step that takes
    the device longer than on crops that are there already waits for its host, or shares the device with the loader.
    """
    from pera_fast.train import loop
    from pera_fast.train.api import pretrain

    host: list[tuple[float, float]] = []

    def launch(*given: Any) -> Any:
        launched = original(*given)
        host.append((1e3 * launched.seconds, 1e3 * launched.waited))
        return launched

    steps, original = 2 * args.rounds * args.steps, loop._launch
    settings = [f"train.steps={steps}", f"train.batch_size={args.batch}", f"train.precision={args.precision}"]
    with mock.patch.object(loop, "_launch", launch):
        pretrain(images, out, args.recipe, overrides=[*settings, f"train.device={device.type}", *args.set, *overrides])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    late = [{**row, "host_ms": ms, "host_waited_ms": waited} for row, (ms, waited) in zip(rows, host, strict=True)]
    keys = "images_per_s", "data_wait", "host_ms", "host_waited_ms"
    return {key: statistics.median(row[key] for row in late[steps // 2 :]) for key in keys}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="pera_bench.quick", description="Measure one thing of a training step.")
    parser.add_argument("part", choices=("step", "published", "trace", "pretrain"))
    parser.add_argument("--batch", type=int, default=64, help="images of a step")
    parser.add_argument("--recipe", default="vit_b16")
    parser.add_argument("--precision", default="bf16", choices=tuple(PRECISIONS))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the recipe")
    parser.add_argument("--backend", help="implementation of all ops that have it")
    parser.add_argument("--checkout", type=Path, help="the published implementation")
    parser.add_argument("--csv", type=Path, default=Path("kernels.csv"))
    parser.add_argument("--json", type=Path, help="write the line of JSON there, too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps of a round")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device)
    measure = {
        "step": measure_step,
        "published": measure_published,
        "trace": measure_trace,
        "pretrain": measure_pretrain,
    }
    line = {**_what(args), **measure[args.part](args, device), **machine(device)}
    _write(args.json, line)
    if args.part == "trace":  # after what only a GPU can say is written
        line |= count_traced(line)
        _write(args.json, line)
    print(json.dumps(line), flush=True)


def _what(args: argparse.Namespace) -> dict[str, Any]:
    what = {"part": args.part, "recipe": args.recipe, "batch": args.batch, "precision": args.precision}
    return {**what, "settings": args.set, "backend": args.backend}


def _write(path: Path | None, line: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(line) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
