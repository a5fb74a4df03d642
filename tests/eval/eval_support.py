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
