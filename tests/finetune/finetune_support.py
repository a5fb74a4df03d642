"""Small weights and labelled images for the tests of fine-tuning."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pera_fast.config import Config, load_config
from pera_fast.model.export import teacher_metadata, timm_state_dict, write_safetensors
from pera_fast.weights.backbone import random_backbone

SIZES = [
    "model.embed_dim=16", "model.depth=2", "model.num_heads=2", "model.patch_size=4", "views.global_size=16",
    "views.local_size=8", "model.student_ratio=0.4", "model.teacher_ratio=0.4",
]  # fmt: skip
SHORT = ["train.batch_size=4", "optim.warmup_epochs=0", "data.loader_threads=1", "finetune.width=8"]


def small_config(more: Sequence[str] = ()) -> Config:
    """Settings of a network that trains in milliseconds."""
    return load_config("tiny", [*SIZES, *more])


def small_weights(path: Path, more: Sequence[str] = ()) -> Path:
    """An exported backbone of these settings, with initial weights."""
    cfg = small_config(more)
    write_safetensors(timm_state_dict(random_backbone(cfg, "").model.state_dict(), ""), path, teacher_metadata(cfg))
    return path


def scenes(root: Path, count: int = 12, size: int = 20) -> Path:
    """Class folders `dark` and `light`, which any network tells apart."""
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 150)):
        (root / name).mkdir(parents=True)
        for number in range(count // 2):
            pixels = rng.integers(low, low + 100, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def masks(root: Path, count: int = 8, size: tuple[int, int] = (28, 24), pairs: bool = False) -> Path:
    """Images with a bright rectangle and masks of it; as pairs, it is in the second image alone."""
    rng = np.random.default_rng(0)
    names = ("before", "after", "masks") if pairs else ("images", "masks")
    for name in names:
        (root / name).mkdir(parents=True)
    for number in range(count):
        mask = np.zeros(size, np.uint8)
        top, left = rng.integers(0, 12, 2)
        mask[top : top + 14, left : left + 12] = 1
        image = rng.integers(0, 60, (*size, 3), dtype=np.uint8)
        if pairs:
            Image.fromarray(image).save(root / "before" / f"{number}.png")
        Image.fromarray(image + 180 * mask[..., None]).save(root / names[-2] / f"{number}.png")
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
    return root


def write_csv(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    """A CSV with these rows, of which the first is its header."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path
