"""`pera-fast profile`: plans the points, runs them, fits, shows and writes the result."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pera_fast.config.keys import did_you_mean
from pera_fast.errors import UserError
from pera_fast.profile import machine
from pera_fast.profile.fits import CARDS, CONTEXT, FRAGMENTATION, compare_simulated, usable
from pera_fast.profile.points import DEVICES, POLICIES, Point, Variant, parse_batch_sizes, parse_choices, plan
from pera_fast.profile.processes import run_points, simulating_jobs
from pera_fast.profile.tables import GIB, Profile, show, write_csv
from pera_fast.progress import progress_display

FORMAT = 1
FAR = (4, 8)  # times the largest batch asked for
WIDE = 160  # columns where the output is not a terminal: tables are not to be cut


def profile(
    recipes: Sequence[str],
    out: str | os.PathLike[str],
    device: str = "auto",
    batch_sizes: str = "8,16,32",
    overrides: Sequence[str] = (),
    *,
    policies: str | None = None,
    dense: bool = True,
    sweep_ratios: bool = False,
    steps: int = 10,
    compare: bool | None = None,
    jobs: int | None = None,
    world_size: int = 1,
) -> Profile:
    """Memory and speed of training steps over batch sizes, written into a folder.

    Args:
        recipes: names of recipes to compare.
        out: folder for profile.json, profile.csv, report.html and PNGs.
        device: simulate (no GPU needed), cuda, cpu; auto: cuda where there is one, else simulate.
        batch_sizes: such as "8,16,32"; two or more give a line.
        overrides: ``section.key=value`` each.
        policies: of recomputation, such as "none,block"; None: all.
        dense: also without masks.
        sweep_ratios: also at other mask ratios.
        steps: timed steps of a point, real devices only.
        compare: also simulate what was measured; None: on cuda.
        jobs: processes that simulate at a time; None: one a core.
        world_size: GPUs that train together, for the predicted times; simulate only.

    Raises:
        UserError: wrong arguments, no such device, a folder that cannot be written, or no point that ran.
    """
    device = _device(device)
    sizes = parse_batch_sizes(batch_sizes)
    variants = plan(recipes, overrides, parse_choices("--policies", policies, POLICIES), dense, sweep_ratios)
    for variant in variants:
        for size in sizes:
            variant.config(size).train.resolve_batch(1)
    folder = make_folder(Path(out), "profile.json")
    points = [
        Point(variant, size, device, steps, world_size=world_size)
        for variant in variants
        for size in _sizes(variant, device, sizes)
    ]
    found = _run(points, jobs)
    if not any(p.ok for p in found):
        raise UserError(f"no point could be run; the first: {found[0].status}: {found[0].note}")
    result = Profile(machine.describe(device), found, sizes)
    if compare if compare is not None else device == "cuda":
        simulated = _run([replace(p, device="simulate") for p in found if p.ok], jobs)
        result.comparisons = compare_simulated(found, simulated)
    write(result, folder)
    console = Console() if sys.stdout.isatty() else Console(width=WIDE)
    show(result, console)
    print(f"report: {folder / 'report.html'}", flush=True)
    return result


def _device(name: str) -> str:
    if name not in ("auto", *DEVICES):
        hint = did_you_mean(name, ("auto", *DEVICES))
        raise UserError(f"--device {name}: no such device; allowed: auto, {', '.join(DEVICES)}{hint}")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "simulate"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU; --device simulate needs none")
    return name


def _sizes(variant: Variant, device: str, asked: list[int]) -> list[int]:
    """Batch sizes to run: simulating is as quick for a large batch, and two far off show how the peak goes on beyond
    those asked for. The sweep of mask ratios compares these ends only.
    """
    if device != "simulate":
        return asked
    far = [factor * asked[-1] for factor in FAR]
    return far if variant.purpose == "ratios" else [*asked, *far]


def make_folder(out: Path, first: str) -> Path:
    """The folder, made if need be; ``first`` is a file that can be written there, or UserError says that it cannot."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / first).touch()
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror}); give another folder") from None
    return out


def _run(points: Sequence[Point], jobs: int | None) -> list[Point]:
    """All points, with a bar on a terminal."""
    simulated = bool(points) and points[0].device == "simulate"
    at_once = (jobs or simulating_jobs()) if simulated else 1
    with progress_display(stderr=False, elapsed=True) as display:
        task = display and display.add_task("simulating" if simulated else "measuring", total=len(points))

        def done(point: Point) -> None:
            if display is not None and task is not None:
                what = f"{point.variant.label()}, batch {point.batch_size}: {point.status}"
                display.update(task, advance=1, description=what)

        return run_points(points, at_once, done)


def write(result: Profile, folder: Path) -> None:
    """profile.json, profile.csv, memory.png, report.html; breakdown, throughput and ratios.png where there is such."""
    from pera_fast.profile import plots  # matplotlib: a second that wrong usage need not wait
    from pera_fast.profile.report import report_html

    (folder / "profile.json").write_text(json.dumps(to_json(result), indent=1) + "\n", encoding="utf-8")
    write_csv(result, folder / "profile.csv")
    pictures = {"memory": plots.memory(result)}
    if any(p.ok and p.at_peak for p in result.points):
        pictures["breakdown"] = plots.breakdown(result)
    if any(p.ok and p.images_per_s for p in result.points):
        pictures["throughput"] = plots.throughput(result)
    if any(p.variant.purpose == "ratios" for p in result.points):
        pictures["ratios"] = plots.ratios(result)
    for name, picture in pictures.items():
        (folder / f"{name}.png").write_bytes(picture)
    (folder / "report.html").write_text(report_html(result, pictures), encoding="utf-8")


def to_json(result: Profile) -> dict[str, Any]:
    """Everything that was found, as plain types; bytes, seconds, images per second."""
    fits = []
    for variant, line in result.fits().items():
        cards = {str(card): result.largest(variant, card) for card in CARDS} if result.predicts else {}
        fits.append({"variant": variant.name(), **asdict(variant), **asdict(line), "largest_batch": cards})
    return {
        "format": FORMAT,
        "machine": result.machine,
        "batch_sizes": result.sizes,
        "cards": {
            "gb_is_bytes": 10**9,
            "kept_free_bytes": CONTEXT,
            "kept_free_share": 0.0 if result.device == "cuda" else FRAGMENTATION,
            "usable_gib": {str(card): usable(card, result.device == "cuda") / GIB for card in CARDS},
        },
        "points": [p.to_json() for p in result.points],
        "fits": fits,
        "sparse_against_dense": [
            {**asdict(c), "memory_ratio": c.memory, "flops_ratio": c.flops, "speed_ratio": c.speed, "text": str(c)}
            for c in result.claims
        ],
        "simulated_against_measured": [
            {**asdict(c), "ratio": c.ratio, "within_tolerance": c.within} for c in result.comparisons
        ],
    }
