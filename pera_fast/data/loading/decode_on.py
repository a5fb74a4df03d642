"""Chooses the decoder of a run (`data.decode_on`): the GPU, or the CPU beside it.

On the GPU decoder and resize take multiprocessors and bandwidth from the step. On the CPU they cost it nothing, and
uint8 crops cross to the GPU by its copy engine, as long as the cores make them faster than the step takes them.
"""

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute
import torch

from pera_fast.config import Config
from pera_fast.config.tree import ViewsConfig
from pera_fast.cores import usable_cores
from pera_fast.data.files.manifest import Manifest

pc: Any = pyarrow.compute  # made when it is imported: type checkers see none of its functions

# Seconds on one core of an AMD EPYC (Zen 5, 2026-11-26, torch 2.13), fitted to the loader's processor time for vit_b16
# and files of 512 and 1024 px: 6.1 and 16 ms for PNG, 4.8 and 11 ms for TIFF (deflate). A JPEG of 512 px takes 2.2 ms
# if it shows a smooth scene, 5.7 ms as an aerial photograph at quality 90, 73 kB: the latter is reckoned with.
_JPEG_PIXEL, _OTHER_PIXEL = 13e-9, 19e-9  # of an image, to read and decode it
_CROP, _CROP_PIXEL = 53e-6, 1.2e-9  # of a crop, and of its pixels
# A core of an older machine takes that many times as long (Xeon at 2.8 GHz, docs/results.md). Taken for all: a loader
# that is too slow costs the step more than one that uses the GPU.
_SLOWEST = 2.1
_MARGIN = 1.25  # times the step's speed that the cores must reach
_MOST_THREADS = 16  # on the CPU, where it is not known how many the step needs
_THREADS = 4  # where a GPU decodes, more are slower: 2417 images/s with 4, 1750 to 1940 with 8 or 16 (H200)


@dataclass(frozen=True)
class Decoding:
    """Decision of `choose`; its text is a line for the log."""

    on: str  # "cpu" or "gpu": where images are decoded and crops are made
    threads: int  # that read and decode
    reason: str

    def __str__(self) -> str:
        where = {"cpu": "CPU", "gpu": "GPU"}[self.on]
        return f"images are decoded and cropped on the {where}, {self.threads} threads: {self.reason}"


def choose(
    wanted: str,
    *,
    has_gpu: bool,
    cores: float,
    image_seconds: float,
    step_rate: float | None,
    threads: int | None = None,
) -> Decoding:
    """Decides where images are decoded, by what costs the step least.

    Args:
        wanted: data.decode_on.
        has_gpu: whether the run's device is a GPU.
        cores: for this process alone.
        image_seconds: of one core, to decode and crop an image.
        step_rate: images/s that the step may reach on its GPU; None: not known.
        threads: data.loader_threads; None: as many as are needed.
    """
    if not has_gpu:
        return Decoding("cpu", threads or _THREADS, "this run has no GPU")
    busy = max(cores - 1, 0.0)  # one is the step's own
    if threads is not None:
        busy = min(busy, float(threads))
    made = busy / image_seconds
    if wanted != "auto":
        on, reason = wanted, f"data.decode_on={wanted}"
    elif step_rate is None:
        on, reason = "gpu", "how fast the step is is not known"
    else:
        on = "cpu" if made >= _MARGIN * step_rate else "gpu"
        limit = f"{cores:.3g} cores" if threads is None else f"{cores:.3g} cores and data.loader_threads={threads}"
        reason = f"{limit} make about {made:,.0f} images/s of these files, the step takes {step_rate:,.0f} at most"
    if threads is None and on == "cpu":
        # Twice what is enough: a core may be shared, a file may be slow, and a thread that waits costs nothing.
        enough = _MOST_THREADS if step_rate is None else math.ceil(2 * _MARGIN * step_rate * image_seconds)
        threads = int(max(1, min(busy, max(enough, _THREADS))))
    return Decoding(on, threads or _THREADS, reason)


def plan(
    cfg: Config, manifest: Manifest, device: torch.device, *, ranks: int = 1, step_rate: float | None = None
) -> Decoding:
    """`choose` for a run on this machine.

    Args:
        cfg: the configuration; read are views, model.in_chans and data.
        manifest: of the data folder.
        device: of the step.
        ranks: processes of this run, over all machines.
        step_rate: as of `choose`.
    """
    return choose(
        cfg.data.decode_on,
        has_gpu=device.type == "cuda",
        cores=usable_cores() / local_ranks(ranks),
        image_seconds=cores_image_seconds(cfg.views, cfg.model.in_chans, *pixels(manifest)),
        step_rate=step_rate,
        threads=cfg.data.loader_threads,
    )


def local_ranks(ranks: int) -> int:
    """Processes of a run on this machine, which share its cores; torchrun says it, else each GPU has one."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    if ranks > 1 and told.isdigit() and int(told):
        return min(int(told), ranks)
    return max(1, min(ranks, torch.cuda.device_count()))


def cores_image_seconds(views: ViewsConfig, channels: int, jpeg: float, other: float) -> float:
    """`image_seconds` as the rule takes it: of a core of an older machine."""
    return _SLOWEST * image_seconds(views, channels, jpeg, other)


def image_seconds(views: ViewsConfig, channels: int, jpeg: float, other: float) -> float:
    """Time of one fast core for an image: reading, decoding, crops.

    Args:
        views: cfg.views.
        channels: of the images; the times are those of three, more cost in proportion.
        jpeg: mean pixels of an image that are of JPEG files.
        other: mean pixels of an image that are of other files.
    """
    seconds = jpeg * _JPEG_PIXEL + other * _OTHER_PIXEL
    for crops, side in ((views.num_global, views.global_size), (views.num_local, views.local_size)):
        seconds += crops * (_CROP + side * side * _CROP_PIXEL)
    return seconds * max(1.0, channels / 3)


def pixels(manifest: Manifest) -> tuple[float, float]:
    """Pixels of an image of the manifest, as means over all: of JPEG files, of other files."""
    table = manifest.table.select(["ok", "format", "width", "height"])
    table = table.filter(table["ok"])
    if not table.num_rows:
        return 0.0, 0.0
    area = table["width"].to_numpy().astype(np.float64) * table["height"].to_numpy()
    jpeg = pc.equal(table["format"], "jpeg").fill_null(False).to_numpy()
    return float(area[jpeg].sum() / len(area)), float(area[~jpeg].sum() / len(area))


def has_jpeg_hardware(device: torch.device) -> bool:
    """Whether the GPU decodes JPEG beside its multiprocessors (A100, A30, H100, H200, B200 and their kin)."""
    if device.type != "cuda":
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return (major, minor) in ((8, 0), (9, 0), (10, 0), (10, 3))
