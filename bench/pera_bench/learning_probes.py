"""Probes of frozen teachers for bench/learning.py, alike for every implementation; results are kept in a file."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pera_fast.config import Config
from pera_fast.eval import kinds
from pera_fast.eval.probes import attempt
from pera_fast.eval.task import parts_of
from pera_fast.features.extract import Extractor
from pera_fast.features.images import load_images
from pera_fast.features.samples import Samples
from pera_fast.weights.backbone import Backbone, filled_backbone, random_backbone
from pera_fast.weights.files import load_torch, parameters
from pera_fast.weights.vit import backbone_state

POOLINGS = "cls", "mean"
KNN, LINEAR = "knn20", "linear"  # of pera_fast.eval.probes
NAMES = {KNN: "knn", LINEAR: "linear"}
BATCH = 64  # images at a time


class Probes:
    """Probes of `pera-fast eval`, on images that are read once: kNN (k=20, T=.07) and logistic regression.

    Args:
        samples: labelled scenes with both splits.
        cfg: of the runs: sizes, bands, normalisation.
        device: cpu or cuda, of the network.
        kept: JSON file of results, written after each probe.
    """

    def __init__(self, samples: Samples, cfg: Config, device: str, kept: Path):
        self.cfg, self.device, self._kept = cfg, torch.device(device), kept
        self._found: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {}
        self._parts, self._kind = parts_of(samples), kinds.OneLabel(samples.classes)
        self._images: list[Tensor] = []

    def checkpoint(self, path: Path, last: bool) -> dict[str, float]:
        """Accuracies of a checkpoint's teacher; those of logistic regression, which takes longer, of the last alone."""
        state, _ = backbone_state(parameters(load_torch(path), path), str(path))
        name = f"{path.parent.parent.name}/{path.name}"
        return self._accuracies(name, lambda: filled_backbone(self.cfg, state, str(path)), last)

    def random(self, seed: int) -> dict[str, float]:
        """Accuracies of the weights that a run of ours begins with."""
        name, cfg = f"random-{seed}", self.cfg.with_values({"train.seed": seed})
        return self._accuracies(name, lambda: random_backbone(cfg, name), True)

    def _accuracies(self, name: str, make: Callable[[], Backbone], linear: bool) -> dict[str, float]:
        probes = (KNN, LINEAR) if linear else (KNN,)
        wanted = {f"{NAMES[probe]}_{pooling}": (probe, pooling) for probe in probes for pooling in POOLINGS}
        found = self._found.setdefault(name, {})
        missing = [key for key in wanted if key not in found]
        if missing:
            features = self._features(make())
            found |= {key: self._accuracy(wanted[key][0], features[wanted[key][1]]) for key in missing}
            partial = self._kept.with_suffix(".partial")
            partial.write_text(json.dumps(self._found, indent=1), encoding="utf-8")
            partial.rename(self._kept)
        return {key: found[key] for key in wanted}

    def _accuracy(self, probe: str, features: Tensor) -> float:
        labelled, truth = (self._kind.targets(part) for part in (self._parts.labelled, self._parts.test))
        tried = attempt(probe, features, labelled, self._parts.rows(1.0), len(labelled), self._kind)
        return self._kind.score(truth, tried.scores.cpu())

    def _features(self, backbone: Backbone) -> dict[str, Tensor]:
        """Rows of the labelled images, then of the test images, of each pooling."""
        extractor = Extractor(backbone, self.device)
        if not self._images:
            files = [paths[0] for part in (self._parts.labelled, self._parts.test) for paths in part.images]
            self._images = list(load_images(files, extractor.size, self.cfg).split(BATCH))
        tokens = [extractor.tokens(images)[0] for images in self._images]
        return {
            "cls": torch.cat([cls.float() for cls, _ in tokens]),
            "mean": torch.cat([patches.float().mean(1) for _, patches in tokens]),
        }
