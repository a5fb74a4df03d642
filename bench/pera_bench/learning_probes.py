"""Probes of frozen teachers for bench/learning.py, alike for every implementation; results are kept in a file."""

import json
from pathlib import Path

import torch
from torch import Tensor

from pera_fast.config import Config
from pera_fast.features.extract import Extractor
from pera_fast.features.images import load_images
from pera_fast.features.knn import knn_accuracy
from pera_fast.features.samples import Samples
from pera_fast.weights.backbone import Backbone, filled_backbone, random_backbone
from pera_fast.weights.files import load_torch, parameters
from pera_fast.weights.vit import backbone_state

POOLINGS = "cls", "mean"
BATCH = 64  # images at a time


class Probes:
    """kNN (k=20, T=.07) on frozen features: from the train split to the test split.

    Args:
        samples: labelled scenes with both splits.
        cfg: of the runs: sizes, bands, normalisation.
        device: cpu or cuda, of the network.
        kept: JSON file of results, written after each probe.
    """

    def __init__(self, samples: Samples, cfg: Config, device: str, kept: Path):
        self.cfg, self.device, self._kept = cfg, torch.device(device), kept
        self._found: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {}
        self._parts = {split: samples.need(split) for split in ("train", "test")}
        self._images: dict[str, Tensor] = {}

    def checkpoint(self, path: Path) -> dict[str, float]:
        """Accuracies of a checkpoint's teacher."""
        name = f"{path.parent.parent.name}/{path.name}"
        if name not in self._found:
            state, _ = backbone_state(parameters(load_torch(path), path), str(path))
            self._keep(name, self._probe(filled_backbone(self.cfg, state, str(path))))
        return self._found[name]

    def random(self, seed: int) -> dict[str, float]:
        """Accuracies of the weights that a run of ours begins with."""
        name = f"random-{seed}"
        if name not in self._found:
            self._keep(name, self._probe(random_backbone(self.cfg.with_values({"train.seed": seed}), name)))
        return self._found[name]

    def _keep(self, name: str, found: dict[str, float]) -> None:
        self._found[name] = found
        partial = self._kept.with_suffix(".partial")
        partial.write_text(json.dumps(self._found, indent=1), encoding="utf-8")
        partial.rename(self._kept)

    def _probe(self, backbone: Backbone) -> dict[str, float]:
        extractor = Extractor(backbone, self.device)
        labels = {name: torch.tensor([row[0] for row in part.labels]) for name, part in self._parts.items()}
        features = {name: self._features(extractor, name) for name in self._parts}
        found = {}
        for pooling in POOLINGS:
            train, test = features["train"][pooling], features["test"][pooling]
            found[f"knn_{pooling}"] = knn_accuracy(train, labels["train"], test, labels["test"])
        return found

    def _features(self, extractor: Extractor, split: str) -> dict[str, Tensor]:
        if split not in self._images:
            files = [paths[0] for paths in self._parts[split].images]
            self._images[split] = load_images(files, extractor.size, self.cfg)
        parts = [extractor.tokens(images)[0] for images in self._images[split].split(BATCH)]
        return {
            "cls": torch.cat([cls.float().cpu() for cls, _ in parts]),
            "mean": torch.cat([patches.float().mean(1).cpu() for _, patches in parts]),
        }
