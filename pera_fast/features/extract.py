"""Extracts features of image files: reads ahead in threads, runs the frozen backbone on a device."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from pera_fast.config.keys import did_you_mean
from pera_fast.cores import usable_cores
from pera_fast.errors import UserError
from pera_fast.features.dense import layer_features
from pera_fast.features.images import ImageReader, resize
from pera_fast.progress import progress_bar
from pera_fast.weights.backbone import Backbone

DEVICES = ("auto", "cpu", "cuda")
POOLINGS = ("cls", "mean", "both")
_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
T = TypeVar("T")
R = TypeVar("R")


def choose_device(wanted: str = "auto") -> torch.device:
    """The device of a frozen network, of `DEVICES`. Raises UserError for others, and for cuda where there is none."""
    if wanted not in DEVICES:
        raise UserError(f"--device {wanted}: wants one of {', '.join(DEVICES)}{did_you_mean(wanted, DEVICES)}")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU; leave it out, or give cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)


class Extractor:
    """A frozen backbone on a device, with images read and normalised as its run did.

    Args:
        backbone: from `weights.load.load_backbone`.
        device: of the network, from `choose_device`.
        size: pixels a side that images are resized to; None: that of the backbone's global crops.
        precision: bf16, fp16 or fp32, of activations and matrix products; None: bf16 on a GPU, else fp32.
        batch_size: images at a time.

    Raises:
        UserError: the size is no multiple of the patch size, or there is no such precision.
    """

    def __init__(
        self,
        backbone: Backbone,
        device: torch.device,
        size: int | None = None,
        precision: str | None = None,
        batch_size: int = 64,
    ):
        self.backbone, self.device, self.batch_size = backbone, device, batch_size
        self.size = self._whole_patches(size or backbone.cfg.views.global_size)
        if precision is not None and precision not in _PRECISIONS:
            raise UserError(f"--precision {precision}: wants one of {', '.join(_PRECISIONS)}")
        self.dtype = _PRECISIONS[precision or ("bf16" if device.type == "cuda" else "fp32")]
        self.read = ImageReader(backbone.cfg)
        self._model = backbone.model.to(device)

    def at(self, size: int) -> "Extractor":
        """The same network for images of another size. Raises UserError: the size is no multiple of the patch size."""
        other = copy(self)
        other.size = self._whole_patches(size)
        return other

    def _whole_patches(self, size: int) -> int:
        patch = self.backbone.cfg.model.patch_size
        if size % patch:
            near = max(round(size / patch), 1) * patch
            raise UserError(f"--size {size}: must be a multiple of the patch size {patch}; nearest: {near}")
        return size

    def tokens(self, images: Tensor, layers: Sequence[int] = (-1,)) -> list[tuple[Tensor, Tensor]]:
        """Features of square images of any multiple of the patch size.

        Args:
            images: uint8 or uint16 [N, S, S, C] on any device.
            layers: blocks after which features are taken, rising; -1 is the last.

        Returns:
            For each layer cls [N, D] and patches [N, L, D] in raster order, normalised, on the extractor's device.
        """
        views = self.backbone.cfg.views
        images = images.to(self.device, non_blocking=True)
        return layer_features(self._model, images, views.mean, views.std, layers, self.dtype)

    def pooled(self, files: Sequence[Path], text: str = "features", progress: bool = True) -> dict[str, Tensor]:
        """Features of image files, each resized to a square.

        Args:
            files: images.
            text: of the progress bar.
            progress: show one, on a terminal.

        Returns:
            float32 [N, D] on the CPU of `cls` and of `mean` (over the patches).

        Raises:
            UserError: a file cannot be read, or has other bands than the weights were trained on.
        """
        parts: dict[str, list[Tensor]] = {"cls": [], "mean": []}
        with progress_bar(text, len(files), wanted=progress) as advance:
            for images in self.batches(files):
                cls, patches = self.tokens(images)[0]
                parts["cls"].append(cls.float().cpu())
                parts["mean"].append(patches.float().mean(1).cpu())
                advance(len(images))
        empty = torch.empty(0, self.backbone.width)
        return {name: torch.cat(rows) if rows else empty for name, rows in parts.items()}

    def batches(self, files: Sequence[Path]) -> Iterator[Tensor]:
        """uint8 or uint16 [n, S, S, C] of the files in order, n at most the batch size; read ahead in threads."""
        images = ahead(lambda file: resize(self.read(file), self.size), files, 2 * self.batch_size)
        while batch := list(islice(images, self.batch_size)):
            yield torch.stack(batch)


def pool(found: dict[str, Tensor], pooling: str) -> Tensor:
    """Rows of a pooling (`POOLINGS`) [N, D], of both [N, 2 D], from what `Extractor.pooled` gave."""
    return torch.cat([found["cls"], found["mean"]], 1) if pooling == "both" else found[pooling]


def ahead(work: Callable[[T], R], items: Sequence[T], most: int, threads: int | None = None) -> Iterator[R]:
    """Results of `work` in the order of the items, made by threads; at most `most` of them wait to be taken."""
    with ThreadPoolExecutor(threads or _threads(), thread_name_prefix="pera-read") as workers:
        waiting = deque(workers.submit(work, item) for item in items[:most])
        following = iter(items[most:])
        try:
            while waiting:
                result = waiting.popleft().result()
                for item in islice(following, 1):
                    waiting.append(workers.submit(work, item))
                yield result
        finally:
            for future in waiting:
                future.cancel()


def _threads() -> int:
    """Whole cores that this process may use."""
    return max(1, int(usable_cores()))
