"""Compares loaders: a Pillow and PyTorch pipeline, ours on a folder, ours on shards, all with the same recipe.

`pera-fast bench data` calls it. Ours goes up to the normalised bf16 patch rows of student and teacher; the other side
to its float views, as published code hands them to the networks. Every measurement is pinned to as many cores as it has
threads. Images/s per core are images per second of processor time, workers included, so other work on the machine does
not count.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from pera_bench import CORES
from pera_bench.command import Wish, device_of
from pera_bench.loader_sides import ours, pillow
from pera_bench.machine import describe
from pera_bench.show import make_console
from pera_fast.config import load_config
from pera_fast.config.keys import did_you_mean
from pera_fast.data.decoding.formats import has_image_suffix
from pera_fast.data.tools.pack import pack
from pera_fast.errors import UserError
from pera_fast.procedural.scenes import CLASSES, write_scenes

SUFFIXES = {"jpeg": "jpg", "png": "png", "tiff": "tif"}
SAVED: dict[str, dict[str, Any]] = {"jpeg": {"quality": 90}, "png": {}, "tiff": {"compression": "tiff_deflate"}}
IMAGES, PIXELS = 256, 256 * 512**2  # the most of a row, pixels of all of them together
SCENES = 64  # different ones, if nobody gives any
SCENE_SIDE = 512
WARM_UP = 2  # batches; nothing waits in a queue then, as no other work is done between them
SIDES = {"pillow": "Pillow, PyTorch", "folder": "ours, folder", "shards": "ours, shards"}
GPU_SIDES = {"pillow": "Pillow, PyTorch", "gpu": "ours, GPU decodes", "cpu": "ours, CPU decodes"}


@dataclass
class LoaderWish:
    """Options of a loader comparison.

    Attributes:
        recipe: its crops and colours.
        formats: of SUFFIXES.
        sizes: pixels a side.
        threads: of each measurement, pinned to as many cores.
        batch_size: images.
        data: folder of images that those measured are made from; None: procedural scenes.
        device: where our crops and rows are made.
        seconds: of each measurement.
    """

    recipe: str = "vit_b16"
    formats: Sequence[str] = tuple(SUFFIXES)
    sizes: Sequence[int] = (512,)
    threads: Sequence[int] = (1,)
    batch_size: int = 16
    data: Path | None = None
    device: str = "cpu"
    seconds: float = 8.0


def compare_loaders(
    asked: Wish,
    formats: str | None,
    sizes: str | None,
    data: Path | None,
    *,
    old: Path | None = None,
    files: tuple[Path | None, Path | None] = (None, None),
    console: Console | None = None,
) -> int:
    """Run `pera-fast bench data`; returns 0. Raises UserError.

    Args:
        asked: the options that other benches have too. `images` is the size of a batch.
        formats, sizes, data: see LoaderWish; lists separated by commas; None: the default.
        old: of --compare, which loaders do not have.
        files: the JSON file, and a folder for loaders.json.
    """
    given = ("compare", old), ("only", asked.only), ("precision", asked.precision), ("sweep", asked.sweep)
    for name, value in (*given, ("processor-time", asked.processor_time)):
        if value:
            raise UserError(f"--{name} does not go with `pera-fast bench data`, which compares loaders")
    wish = LoaderWish(
        asked.recipes or LoaderWish.recipe,
        formats.split(",") if formats else LoaderWish.formats,
        numbers("--sizes", sizes) or LoaderWish.sizes,
        (asked.threads,) if asked.threads else sorted({1, len(CORES)}),
        (numbers("--images", asked.images) or [LoaderWish.batch_size])[0],
        data,
        device_of(asked),
        LoaderWish.seconds if asked.seconds is None else asked.seconds,
    )
    json_file, out = files
    run(wish, [path for path in (json_file, out and out / "loaders.json") if path], console or make_console())
    return 0


def numbers(option: str, text: str | None) -> list[int]:
    """Numbers of a list with commas. Raises UserError."""
    parts = text.split(",") if text else []
    if not all(part.isdigit() and int(part) for part in parts):
        raise UserError(f"{option} {text}: wants whole numbers from 1 on, separated by commas")
    return [int(part) for part in parts]


def run(wish: LoaderWish, files: Sequence[Path], console: Console) -> None:
    """Measures, prints a line for each format, size and number of threads, writes the files. Raises UserError."""
    check(wish)
    with tempfile.TemporaryDirectory(prefix="pera-bench-") as name:
        scratch = Path(name)
        sources = [path for path in sorted((wish.data or scenes(scratch)).rglob("*")) if has_image_suffix(path.name)]
        if not sources:
            raise UserError(f"--data {wish.data}: no image in it")
        record: dict[str, Any] = {
            "bench": "loaders", "machine": describe(torch.device(wish.device)), "recipe": wish.recipe,
            "batch_size": wish.batch_size, "images": str(wish.data.name) if wish.data else "scenes", "rows": [],
        }  # fmt: skip
        m = record["machine"]
        console.print(f"{wish.recipe}, batches of {wish.batch_size}, {m['device']}, torch {m['torch']}, {m['commit']}")
        console.print("images/s for each second of processor time (images/s)")
        names = "".join(f"{side:>20}" for side in sides_of(wish).values())
        console.print(f"{'images':<24}{'threads':>8}{names}{'ratio':>14}")
        for kind in wish.formats:
            for size in wish.sizes:
                folder = scratch / f"{kind}-{size}"
                made = make_images(folder / "images", kind, size, sources, wish.batch_size)
                pack(folder / "images", folder / "shards", progress=False)
                for threads in wish.threads:
                    row = {"format": kind, "size": size, "threads": threads, **made}
                    record["rows"].append(row | {"sides": compare(wish, folder, threads)})
                    console.print(line(record["rows"][-1]))
                    for path in files:  # each time: a long comparison may be stopped
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_text(json.dumps(record, indent=1) + "\n")
        for path in files:
            console.print(f"JSON: {path}")


def check(wish: LoaderWish) -> None:
    """Raises UserError for what does not exist."""
    for kind in wish.formats:
        if kind not in SUFFIXES:
            hint = did_you_mean(kind, SUFFIXES)
            raise UserError(f"--formats {kind}: wants some of {', '.join(SUFFIXES)}, separated by commas{hint}")
    if any(threads > len(CORES) for threads in wish.threads):
        raise UserError(f"--threads {max(wish.threads)}: there are {len(CORES)} cores")
    if wish.data is not None and not wish.data.is_dir():
        raise UserError(f"--data {wish.data}: no such folder")


def scenes(scratch: Path) -> Path:
    """A folder of procedural overhead scenes."""
    write_scenes(scratch / "scenes", -(-SCENES // len(CLASSES)), size=SCENE_SIDE)
    return scratch / "scenes"


def make_images(folder: Path, kind: str, size: int, sources: Sequence[Path], least: int) -> dict[str, int]:
    """Square images of one kind, from `sources` in turns; how many these are and their bytes.

    A source that is smaller is laid side by side with itself, so that the detail of a pixel stays what it was.
    """
    folder.mkdir(parents=True)
    count, total = max(least, min(IMAGES, PIXELS // size**2)), 0
    for number in range(count):
        with Image.open(sources[number * len(sources) // count]) as file:
            source = np.asarray(file.convert("RGB"))
        times = [-(-size // side) for side in source.shape[:2]]
        path = folder / f"{number:05d}.{SUFFIXES[kind]}"
        Image.fromarray(np.tile(source, (*times, 1))[:size, :size]).save(path, **SAVED[kind])
        total += path.stat().st_size
    return {"images": count, "bytes": total}


def compare(wish: LoaderWish, folder: Path, threads: int) -> dict[str, dict[str, float]]:
    """The sides, each on as many cores as threads."""
    size = wish.batch_size
    cfg = load_config(wish.recipe, [f"train.batch_size={size}", f"data.loader_threads={threads}"])
    pinned, before = os.sched_getaffinity(0), torch.get_num_threads()
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, sorted(CORES)[:threads])
    try:
        sides = {"pillow": measure(pillow(folder / "images", cfg, threads, size), size, wish.seconds)}
        where = {"shards": folder / "shards"}
        for name in list(sides_of(wish))[1:]:
            on = name if name in ("gpu", "cpu") else None
            with ours(where.get(name, folder / "images"), cfg, size, folder, torch.device(wish.device), on) as loader:
                sides[name] = measure(loader, size, wish.seconds)
    finally:
        os.sched_setaffinity(0, pinned)
        torch.set_num_threads(before)
    return sides


def measure(batches: Iterator[Any], size: int, seconds: float) -> dict[str, float]:
    """Takes batches of `size` images for some seconds, after some to warm up."""
    for _ in range(WARM_UP):
        next(batches)
    count, began, used = 0, time.perf_counter(), processor_seconds()
    while time.perf_counter() - began < seconds:
        next(batches)
        count += size
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elapsed, used = time.perf_counter() - began, processor_seconds() - used
    return {"images_per_s": count / elapsed, "images_per_core_s": count / used, "cores": used / elapsed}


def sides_of(wish: LoaderWish) -> dict[str, str]:
    """Sides to compare on the device, by their names in the record."""
    return SIDES if wish.device == "cpu" else GPU_SIDES


def processor_seconds() -> float:
    """Processor time of this process and its workers, ended ones too: a loader may start new ones for each epoch."""
    alive = multiprocessing.active_children()  # waits for those that have ended, which are counted from then on
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in alive:
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    name = f"{row['format']} {row['size']} px, {row['bytes'] / row['images'] / 1024:.0f} KiB"
    sides = list(row["sides"].values())
    cells = "".join(f"{side['images_per_core_s']:>11.1f} ({side['images_per_s']:>6.1f})" for side in sides)
    ratios = " ".join(f"{side['images_per_core_s'] / sides[0]['images_per_core_s']:.1f}" for side in sides[1:])
    return f"{name:<24}{row['threads']:>8}{cells}{ratios:>14}"
