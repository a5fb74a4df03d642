"""The two sides of the loader comparison: our loader, and a Pillow and PyTorch pipeline of the same recipe."""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch.utils.data import DataLoader, Dataset

from pera_fast.config import Config
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.index.build import build_index
from pera_fast.data.loading.batch import Batch
from pera_fast.data.loading.decode_on import Decoding
from pera_fast.data.loading.loader import Loader
from pera_fast.model.inputs import StepInputs
from pera_fast.train.inputs import make_inputs
from pera_kernels.visible_patches import contrast_mean, visible_patches


class PillowViews(Dataset):
    """Decode with Pillow; per crop RandomResizedCrop and flips; per view colour jitter, float tensor, normalise."""

    def __init__(self, folder: Path, cfg: Config):
        self._files = sorted(path for path in folder.iterdir() if path.is_file())
        self._views = cfg.views
        self._mean = torch.tensor(cfg.views.mean).view(3, 1, 1)
        self._std = torch.tensor(cfg.views.std).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> list[torch.Tensor]:
        """Student and teacher view of each crop, float32 [3, side, side]."""
        v, found = self._views, []
        with Image.open(self._files[number]) as file:
            image = file.convert("RGB")
        groups = ((v.num_global, v.global_size, v.global_scale), (v.num_local, v.local_size, v.local_scale))
        for count, side, scale in groups:
            for _ in range(count):
                crop = self._crop(image, side, scale)
                student = random.random() < v.student_color
                gray = student and random.random() < v.student_gray
                view = crop.convert("L").convert("RGB") if gray else self._jitter(crop) if student else crop
                found.append(self._tensor(view))
                found.append(self._tensor(self._jitter(crop) if random.random() < v.teacher_color else crop))
        return found

    def _crop(self, image: Image.Image, side: int, scale: list[float]) -> Image.Image:
        width, height = image.size
        for _ in range(10):
            area = width * height * random.uniform(*scale)
            aspect = math.exp(random.uniform(*map(math.log, self._views.aspect)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                break
        else:
            w, h = width, height
        left, top = random.randint(0, width - w), random.randint(0, height - h)
        crop = image.crop((left, top, left + w, top + h)).resize((side, side), Image.Resampling.BILINEAR)
        if random.random() < self._views.hflip:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if random.random() < self._views.vflip:
            crop = crop.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        return crop

    def _jitter(self, image: Image.Image) -> Image.Image:
        v = self._views
        steps = [(ImageEnhance.Brightness, v.brightness), (ImageEnhance.Contrast, v.contrast)]
        steps += [(ImageEnhance.Color, v.saturation), (None, v.hue)]
        for step, reach in random.sample(steps, 4):
            amount = random.uniform(-reach, reach)
            image = step(image).enhance(1 + amount) if step else _shift_hue(image, amount)
        return image

    def _tensor(self, image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.to(torch.float32).div(255).sub_(self._mean).div_(self._std)


def _shift_hue(image: Image.Image, shift: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = (np.asarray(hue, np.int16) + round(shift * 255)).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def pillow(folder: Path, cfg: Config, threads: int, batch_size: int) -> Iterator[Any]:
    """Batches of float views, for ever, from worker processes."""
    options = {"shuffle": True, "drop_last": True, "num_workers": threads, "persistent_workers": True}
    loader = DataLoader(PillowViews(folder, cfg), batch_size, **options)
    while True:
        yield from loader


@contextmanager
def ours(
    data: Path, cfg: Config, batch_size: int, scratch: Path, device: torch.device, on: str | None = None
) -> Iterator[Iterator[StepInputs]]:
    """Our loader as the trainer opens it, and the rows of student and teacher: on a CPU made in the loader's thread, on
    a GPU from what has arrived there.

    Args:
        on: "cpu" or "gpu", where images are decoded for a GPU; None: as the device says.
    """
    manifest = build_index(data, out=scratch / f"{data.name}.parquet", progress=False)

    def rows(inputs: StepInputs) -> StepInputs:
        for group in (inputs.global_, inputs.local):
            for index, order, factors in (
                (group.student_index, group.student_order, group.student_factors),
                (group.teacher_index, group.teacher_order, group.teacher_factors),
            ):
                assert order is not None
                assert factors is not None
                gray = contrast_mean(group.crops, order, factors)
                patch, mean, std = cfg.model.patch_size, cfg.views.mean, cfg.views.std
                visible_patches(group.crops, index, order, factors, gray, mean, std, patch, torch.bfloat16)
        return inputs

    def transform(batch: Batch) -> StepInputs:
        inputs = make_inputs(batch, cfg)
        return rows(inputs) if device.type == "cpu" else inputs

    decoding = None if on is None else Decoding(on, cfg.data.loader_threads or 1, "compared")
    skipped = SkippedFiles(scratch / "skipped.csv")
    with Loader(
        cfg, manifest, batch_size=batch_size, device=device, skipped=skipped, transform=transform, decoding=decoding
    ) as loader:
        yield loader if device.type == "cpu" else map(rows, loader)
