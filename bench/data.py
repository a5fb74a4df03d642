"""Loaders side by side: a Pillow and PyTorch pipeline of the same recipe, ours on a folder, ours on its shards.

    python bench/data.py --formats jpeg png tiff --sizes 512 --threads 1 2 --out bench/results/loaders

Ours goes up to the normalised bf16 patch rows of student and teacher; the other side to its float views, as published
code hands them to the networks. Every measurement is pinned to as many cores as it has threads. Images/s per core
are images per second of processor time, workers included, so other work on the machine does not count.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_sides import ours, pillow
from pera_fast.config import load_config
from pera_fast.data.pack import pack
from pera_fast.profile.machine import commit, device_name

SUFFIXES = {"jpeg": "jpg", "png": "png", "tiff": "tif"}
JPEG_QUALITY = 90
BATCH = 16
WARM_UP = 2  # batches; nothing waits in a queue then, as no other work is done between them


def make_images(folder: Path, kind: str, size: int, count: int, sources: list[Path]) -> int:
    """`count` images of one kind, enlarged from `sources` if there are any, else smooth noise; returns their bytes."""
    folder.mkdir(parents=True)
    options: dict[str, Any] = {"quality": JPEG_QUALITY} if kind == "jpeg" else {}
    if kind == "tiff":
        options = {"compression": "tiff_deflate"}
    total = 0
    for number in range(count):
        if sources:
            with Image.open(sources[number * len(sources) // count]) as file:
                small = file.convert("RGB")
        else:
            small = Image.fromarray(np.random.default_rng(number).integers(0, 256, (size // 4, size // 4, 3), np.uint8))
        path = folder / f"{number:05d}.{SUFFIXES[kind]}"
        small.resize((size, size), Image.Resampling.BICUBIC).save(path, **options)
        total += path.stat().st_size
    return total


def processor_seconds() -> float:
    """Of this process and its workers, those that have ended too: a loader may start new ones for each epoch."""
    alive = multiprocessing.active_children()  # waits for those that have ended, which are counted from then on
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in alive:
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def measure(batches: Iterator[Any], seconds: float) -> dict[str, float]:
    """Takes batches for some seconds, after some to warm up."""
    for _ in range(WARM_UP):
        next(batches)
    count, began, used = 0, time.perf_counter(), processor_seconds()
    while time.perf_counter() - began < seconds:
        next(batches)
        count += BATCH
    elapsed, used = time.perf_counter() - began, processor_seconds() - used
    return {"images_per_s": count / elapsed, "images_per_core_s": count / used, "cores": used / elapsed}


def compare(scratch: Path, folder: Path, shards: Path, threads: int, recipe: str, seconds: float) -> dict[str, Any]:
    """One row: the three sides on as many cores as threads."""
    cores = sorted(os.sched_getaffinity(0))
    cfg = load_config(recipe, [f"train.batch_size={BATCH}", f"data.loader_threads={threads}"])
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, cores[:threads])
    try:
        sides = {"pillow": measure(pillow(folder, cfg, threads, BATCH), seconds)}
        for name, data in (("folder", folder), ("shards", shards)):
            with ours(data, cfg, BATCH, scratch) as loader:
                sides[name] = measure(loader, seconds)
    finally:
        os.sched_setaffinity(0, cores)
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="vit_b16")
    parser.add_argument("--formats", nargs="+", default=["jpeg"], choices=list(SUFFIXES))
    parser.add_argument("--sizes", nargs="+", type=int, default=[512], help="pixels a side")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--images", type=int, default=256, help="different images")
    parser.add_argument("--scenes", type=Path, help="folder of images to enlarge; default: smooth noise")
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    args = parser.parse_args()
    sources = sorted(path for path in args.scenes.rglob("*") if path.is_file()) if args.scenes else []
    rows = []
    print(f"{args.recipe}, batches of {BATCH}, {device_name('cpu')}; images/s (images/s per core)")
    print(f"{'images':<22}{'threads':>8}{'Pillow, PyTorch':>20}{'folder':>20}{'shards':>20}{'ratio per core':>17}")
    for kind in args.formats:
        for size in args.sizes:
            with tempfile.TemporaryDirectory() as name:
                scratch = Path(name)
                total = make_images(scratch / "images", kind, size, args.images, sources)
                pack(scratch / "images", scratch / "shards", progress=False)
                for threads in args.threads:
                    sides = compare(scratch, scratch / "images", scratch / "shards", threads, args.recipe, args.seconds)
                    rows.append({"format": kind, "size": size, "threads": threads, "bytes": total, "sides": sides})
                    print(_line(rows[-1], args.images), flush=True)
                    if args.out:  # each time: a long comparison may be stopped
                        write(args, rows)
    if args.out:
        print(path_of(args))


def path_of(args: argparse.Namespace) -> Path:
    """The file of a comparison."""
    return args.out / f"data-{args.recipe}-cpu.json"


def write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """What was measured, and where."""
    record = {
        "bench": "data", "recipe": args.recipe, "batch_size": BATCH, "device": device_name("cpu"), "rows": rows,
        "ended_workers_count": True,  # earlier files lack the time of workers that had ended
        "images": args.images, "scenes": args.scenes is not None, "jpeg_quality": JPEG_QUALITY,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__,
        "python": platform.python_version(), "commit": commit(), "date": date.today().isoformat(),
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    path_of(args).write_text(json.dumps(record, indent=2) + "\n")


def _line(row: dict[str, Any], images: int) -> str:
    name = f"{row['format']} {row['size']}, {row['bytes'] / images / 1024:.0f} KiB"
    sides = row["sides"]
    cells = "".join(f"{side['images_per_s']:>11.1f} ({side['images_per_core_s']:>6.1f})" for side in sides.values())
    base = sides["pillow"]["images_per_core_s"]
    ratios = " ".join(f"{sides[side]['images_per_core_s'] / base:.2f}" for side in ("folder", "shards"))
    return f"{name:<22}{row['threads']:>8}{cells}{ratios:>17}"


if __name__ == "__main__":
    main()
