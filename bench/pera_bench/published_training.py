"""Trains the authors' implementation as its users do: their images, transforms, network, loss, optimiser and EMA.

Nothing of it is in this repository; see `published.py`. The schedules are ours, which have the same values
(docs/method.md section 6.3), so that both sides of a comparison get one configuration. Where their frame wants a GPU
and a process group, this one has neither: on a CPU one process trains in float32.
"""

import importlib
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from pera_bench.published import PublishedStep, find_modules
from pera_fast.config import Config, ViewsConfig
from pera_fast.errors import UserError
from pera_fast.model.pera import PRECISIONS
from pera_fast.train.schedules import make_schedules

NAMES = {
    "global_dino_loss": "global_cls_loss",
    "local_dino_loss": "local_cls_loss",
    "koleo_loss": "koleo_loss",
    "mae_loss": "pixel_loss",
}  # theirs -> ours


def train_published(
    checkout: Path, cfg: Config, images: Path, run: Path, save_every: int, device: torch.device, workers: int
) -> None:
    """Train from scratch, and leave metrics.jsonl and checkpoints/step_N.params in the run's folder.

    Args:
        checkout: folder of the authors' repository.
        cfg: sizes, views, schedules, batch, precision and seed.
        images: folder of image files.
        run: folder to write to.
        save_every: steps between checkpoints; the last step has one too.
        device: of the network.
        workers: processes that read and transform images; 0: this one does.

    Raises:
        UserError: torchvision, which their transforms are made of, cannot be imported.
    """
    find_modules(checkout)
    importlib.import_module("Utils.seed").set_seed(cfg.train.seed, is_benchmark=True)
    loader, sampler = _loader(cfg, images, workers, device)
    side = PublishedStep(checkout, cfg, device)
    schedules = make_schedules(cfg, len(loader))
    saved = run / "checkpoints"
    saved.mkdir(parents=True)
    with (run / "metrics.jsonl").open("w", encoding="utf-8", buffering=1) as metrics:
        step = epoch = 0
        while step < schedules.steps:
            sampler.set_epoch(epoch)
            for batch in loader:
                before = time.perf_counter()
                numbers = _step(side, batch, schedules.at(step), device)
                step += 1
                seconds = time.perf_counter() - before
                metrics.write(json.dumps({"step": step, "epoch": epoch, **numbers, "step_s": seconds}) + "\n")
                if step % save_every == 0 or step == schedules.steps:
                    _save(side, saved / f"step_{step:08d}.params", epoch)
                if step == schedules.steps:
                    break
            epoch += 1


def _step(side: PublishedStep, batch: dict[str, Any], values: Any, device: torch.device) -> dict[str, float]:
    for group in side.optimizer.param_groups:
        group["lr"], group["weight_decay"] = values.lr, values.weight_decay
    views = {name.replace("_collated", ""): view.to(device, non_blocking=True) for name, view in batch.items()}
    dtype = PRECISIONS[side.cfg.train.precision]
    loss = side.step(views, dtype, values.teacher_temp, values.momentum)
    # As in their frame, the host waits for every loss.
    numbers = {"loss": loss.item(), **{NAMES[name]: part.item() for name, part in side.parts.items()}}
    numbers["grad_norm"] = side.grad_norm.item()
    return {**numbers, "lr": values.lr, "momentum": values.momentum, "teacher_temp": values.teacher_temp}


def _save(side: PublishedStep, path: Path, epoch: int) -> None:
    """Write what their frame writes, whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save({"model": side.net.state_dict(), "optimizer": side.optimizer.state_dict(), "epoch": epoch}, partial)
    partial.rename(path)


def _loader(cfg: Config, images: Path, workers: int, device: torch.device) -> tuple[Any, Any]:
    try:
        augmentation = importlib.import_module("Utils.augmentation.augmentation")
    except (ImportError, RuntimeError) as error:  # a build for another torch raises the latter
        raise UserError(
            f"the published implementation's transforms need a torchvision that fits torch {torch.__version__}: {error}"
        ) from error
    dataset_class = importlib.import_module("Utils.dataset").PretrainDataset
    collate = importlib.import_module("Utils.collate").pera_collate
    space = SimpleNamespace(AUG=_augmentation(cfg.views))
    dataset = dataset_class(space, augmentation.PerAAugmentation(space), str(images))
    sampler = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=True)
    loader = DataLoader(
        dataset,
        batch_size=cfg.train.resolve_batch(1).total,
        sampler=sampler,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        drop_last=True,
        collate_fn=collate,
    )
    return loader, sampler


def _augmentation(views: ViewsConfig) -> SimpleNamespace:
    """The settings of their transforms; their probabilities are constants of the code, and ours by default."""
    return SimpleNamespace(
        NUM_GLOBAL=views.num_global,
        NUM_LOCAL=views.num_local,
        GLOBAL_CROP_SIZE=views.global_size,
        LOCAL_CROP_SIZE=views.local_size,
        GLOBAL_SCALE=views.global_scale,
        LOCAL_SCALE=views.local_scale,
        GLOBAL_RATIO=views.aspect,
        LOCAL_RATIO=views.aspect,
        INTENSITY=views.brightness,
        CONTRAST=views.contrast,
        SATURATION=views.saturation,
        HUE=views.hue,
        NORMALIZE=SimpleNamespace(MEAN=views.mean, STD=views.std),
    )
