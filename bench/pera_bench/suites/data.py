"""The loader alone: JPEG files of overhead scenes to uint8 crops on the device, colours and masks drawn."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pera_bench import CORES
from pera_bench.point import Point
from pera_bench.work import Cost, Unavailable, Whole
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.index.build import build_index
from pera_fast.data.loading.loader import Loader
from pera_fast.errors import UserError
from pera_fast.procedural.scenes import CLASSES, write_scenes
from pera_fast.train.inputs import make_inputs

IMPLEMENTATIONS = ("pera-fast",)
CASES = {"jpeg": ("batch",)}
SIDE = 512  # pixels of the scenes


def make(point: Point, case: str) -> Whole:
    """Neither bytes nor FLOPs are stated: decoding is most of it."""
    return Whole({"pera-fast": lambda: batches(point)}, Cost())


def batches(point: Point) -> Callable[[], Any]:
    """A function that gives the next batch; the files stay in the page cache."""
    folder = tempfile.TemporaryDirectory(prefix="pera-bench-")
    root = Path(folder.name)
    write_scenes(root / "images", -(-point.images // len(CLASSES)), size=SIDE)
    manifest = build_index(root / "images", out=root / "index.parquet", progress=False)
    pinned = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)  # the loader's threads inherit it: they are not to share one core
    try:
        loader = Loader(
            point.cfg,
            manifest,
            batch_size=point.images,
            device=point.device,
            skipped=SkippedFiles(root / "skipped.csv"),
            transform=lambda batch: make_inputs(batch, point.cfg),
        )
    except UserError as error:
        raise Unavailable(str(error)) from error
    finally:
        os.sched_setaffinity(0, pinned)
    loader.folder = folder  # type: ignore[attr-defined] - goes when the loader goes
    return lambda: next(loader)
