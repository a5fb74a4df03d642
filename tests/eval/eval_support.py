"""A small network and small scenes for evaluations."""

from pathlib import Path

import numpy as np
from PIL import Image

from pera_fast.config import load_config
from pera_fast.weights.backbone import Backbone, random_backbone

SMALL = ("model.depth=1", "model.embed_dim=32", "model.num_heads=2", "views.global_size=16", "views.num_local=0")


def network(seed: int = 0, source: str = "small", *overrides: str) -> Backbone:
    """A network of one block that sees images of 16 px."""
    return random_backbone(load_config("tiny", [*SMALL, *overrides, f"train.seed={seed}"]), source)


def write_scenes(root: Path, counts: dict[str, int], size: int = 20) -> Path:
    """Noise of another brightness for each class, which overlap a little, as `root/CLASS/N.png`."""
    rng = np.random.default_rng(0)
    for label, (name, count) in enumerate(counts.items()):
        for number in range(count):
            path = root / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            level = 60 + 50 * label + rng.normal(0, 14)
            pixels = rng.normal(level, 25, (size, size, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


def write_csv(path: Path, header: str, rows: list[str]) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def write_masks(root: Path, count: int, size: int = 24, ignored: int | None = None) -> Path:
    """Dark ground with a bright rectangle of class 1, as `images` and `masks` of the same stems; a CSV names both."""
    rng = np.random.default_rng(1)
    rows = []
    for number in range(count):
        mask = _rectangle(rng, size)
        _save(root / "images" / f"{number}.png", _noisy(rng, mask))
        if ignored is not None:
            mask[:3] = ignored
        _save(root / "masks" / f"{number}.png", mask)
        rows.append(f"images/{number}.png,masks/{number}.png,{'train' if number < count * 2 // 3 else 'test'}")
    return write_csv(root / "set.csv", "image,mask,split", rows)


def write_changes(root: Path, count: int, size: int = 24) -> Path:
    """Pairs of noise, of which the second has a bright rectangle: what changed. A CSV names them."""
    rng = np.random.default_rng(2)
    rows = []
    for number in range(count):
        mask = _rectangle(rng, size)
        _save(root / "before" / f"{number}.png", _noisy(rng, 0 * mask))
        _save(root / "after" / f"{number}.png", _noisy(rng, mask))
        _save(root / "mask" / f"{number}.png", mask)
        names = ",".join(f"{folder}/{number}.png" for folder in ("before", "after", "mask"))
        rows.append(f"{names},{'train' if number < count * 2 // 3 else 'test'}")
    return write_csv(root / "set.csv", "before,after,mask,split", rows)


def _rectangle(rng: np.random.Generator, size: int) -> np.ndarray:
    top, left = rng.integers(0, size // 2, 2)
    mask = np.zeros((size, size), np.uint8)
    mask[top : top + size // 2, left : left + size // 2] = 1
    return mask


def _noisy(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    return (60 + 120 * mask[..., None] + rng.normal(0, 12, (*mask.shape, 3))).clip(0, 255).astype(np.uint8)


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
