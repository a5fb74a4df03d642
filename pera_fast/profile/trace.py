"""`pera-fast profile trace`: records a few steps with torch.profiler."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity

from pera_fast.config import Config, load_config
from pera_fast.config.keys import did_you_mean
from pera_fast.errors import UserError
from pera_fast.profile import machine
from pera_fast.profile.batches import random_inputs
from pera_fast.profile.measure import WARM_UP, real_step, synchronize
from pera_fast.profile.points import DEVICES
from pera_fast.profile.run import WIDE, make_folder
from pera_fast.ranges import PREFIX

TOP = 20  # ops in the terminal's table; the file has all
SNAPSHOT_EVENTS = 200_000  # allocations that a memory snapshot may hold


@dataclass(frozen=True)
class Row:
    """An op, a kernel or a named range.

    Attributes:
        calls: in a step.
        seconds: of a step; ops and kernels: their own, without what they call; ranges: from beginning to end.
        share: of the sum over all ops or kernels; ranges: of the step.
    """

    name: str
    calls: float
    seconds: float
    share: float


@dataclass(frozen=True)
class Trace:
    """Results of a trace: ``ops`` (kernels on a GPU) and named ``ranges``, most time first."""

    path: Path
    ops: list[Row]
    ranges: list[Row]
    snapshot: Path | None


def trace(
    recipe: str,
    out: str | os.PathLike[str],
    device: str = "auto",
    steps: int = 3,
    overrides: Sequence[str] = (),
) -> Trace:
    """Records some steps on random crops, at the recipe's batch size, into a folder.

    Without a CUDA graph, whose replays have neither ranges nor allocations, unless ``train.cuda_graph=true`` is given:
    then the kernels are those of a run, and the ranges those of the update alone.

    Writes trace.json.gz (for Perfetto or chrome://tracing), ops.csv, ranges.csv and on CUDA memory_snapshot.pickle (for
    pytorch.org/memory_viz).

    Args:
        recipe: name of a recipe.
        out: the folder.
        device: cuda or cpu; auto: cuda where there is one.
        steps: recorded steps, after some that warm up.
        overrides: ``section.key=value`` each.

    Raises:
        UserError: wrong arguments, no such device, or a folder that cannot be written.
    """
    chosen = torch.device(_device(device))
    cfg = without_graph(load_config(recipe, overrides))
    plan = cfg.train.resolve_batch(1)
    folder = make_folder(Path(out), "trace.json.gz")
    host = random_inputs(cfg, plan.per_device)  # each step sends them to the device: that is the range "data"
    step = real_step(cfg, chosen, repeat(host))
    for _ in range(WARM_UP):
        step()
    synchronize(chosen)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if chosen.type == "cuda" else [])
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # it says on stderr when it starts and stops
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(steps):
            with torch.profiler.record_function(PREFIX + "step"):
                step()
        synchronize(chosen)
    path = folder / "trace.json.gz"
    recorded.export_chrome_trace(str(path))
    averages = recorded.key_averages()
    found = Trace(path, op_rows(averages, steps, chosen), range_rows(averages, steps), _snapshot(step, folder, chosen))
    _write(folder / "ops.csv", found.ops)
    _write(folder / "ranges.csv", found.ranges)
    _show(found, cfg, plan.per_device, chosen)
    return found


def without_graph(cfg: Config) -> Config:
    """The configuration, its ``train.cuda_graph=auto`` decided: no."""
    if cfg.train.cuda_graph != "auto":
        return cfg
    return replace(cfg, train=replace(cfg.train, cuda_graph="false"))


def _device(name: str) -> str:
    real = [device for device in DEVICES if device != "simulate"]
    if name not in ("auto", *real):
        hint = did_you_mean(name, ("auto", *real))
        raise UserError(f"--device {name}: a trace is of real steps; allowed: auto, {', '.join(real)}{hint}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU; --device cpu needs none")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def op_rows(averages: EventList, steps: int, device: torch.device) -> list[Row]:
    """Kernels of a GPU, or ops of a CPU, by the time that is their own; named ranges are not among them."""
    rows = []
    for event in averages:
        if event.key.startswith(PREFIX) or getattr(event, "is_user_annotation", False):
            continue
        if device.type == "cuda":
            micros = event.self_device_time_total if event.device_type == DeviceType.CUDA else 0
        else:
            micros = event.self_cpu_time_total
        if micros > 0:
            rows.append((event.key, event.count / steps, micros / 1e6 / steps))
    total = sum(seconds for *_, seconds in rows)
    found = [Row(name, calls, seconds, seconds / total) for name, calls, seconds in rows]
    return sorted(found, key=lambda row: -row.seconds)


def range_rows(averages: EventList, steps: int) -> list[Row]:
    """Named ranges on the host, from beginning to end; those inside others count in both."""
    named = [e for e in averages if e.key.startswith(PREFIX) and e.device_type == DeviceType.CPU]
    whole = next((e.cpu_time_total for e in named if e.key == PREFIX + "step"), 0) or 1
    rows = [
        Row(e.key[len(PREFIX) :], e.count / steps, e.cpu_time_total / 1e6 / steps, e.cpu_time_total / whole)
        for e in named
    ]
    return sorted(rows, key=lambda row: -row.seconds)


def _snapshot(step: Callable[[], object], folder: Path, device: torch.device) -> Path | None:
    """A step's allocations, for PyTorch's viewer; None on a CPU."""
    if device.type != "cuda":
        return None
    path = folder / "memory_snapshot.pickle"
    torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_EVENTS)
    step()
    synchronize(device)
    torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(enabled=None)
    return path


def _write(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "calls_per_step", "seconds_per_step", "share"])
        writer.writerows([row.name, row.calls, row.seconds, row.share] for row in rows)


def _show(found: Trace, cfg: Config, batch_size: int, device: torch.device) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=WIDE)
    name = machine.device_name(device.type)
    print(f"{cfg.recipe}, batch {batch_size}, {cfg.train.precision}, recompute {cfg.model.recompute}; {name}")
    what = "Kernels" if device.type == "cuda" else "Ops, time of their own"
    for title, rows in (("Named ranges, on the host", found.ranges), (what, found.ops[:TOP])):
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("name", max_width=90, overflow="ellipsis", no_wrap=True)
        for heading in ("calls a step", "ms a step", "share"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(row.name, f"{row.calls:g}", f"{row.seconds * 1e3:.3f}", f"{row.share:.1%}")
        console.print(table)
    if device.type == "cuda":
        graph = cfg.train.cuda_graph == "true"
        print("a CUDA graph's replays" if graph else "no CUDA graph: train.cuda_graph=true traces its replays")
    if found.snapshot is None:
        print("memory snapshot: none, it needs CUDA")
    else:
        print(f"memory snapshot: {found.snapshot} (pytorch.org/memory_viz shows it)")
    print(f"trace: {found.path} (ui.perfetto.dev shows it)", flush=True)
