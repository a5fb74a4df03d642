"""Writes and reads a fine-tuned network: one safetensors file with all that it takes to use it."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from pera_fast.config import Config
from pera_fast.errors import UserError, one_line
from pera_fast.finetune.model import FineTuner, HeadPlan
from pera_fast.model.export import teacher_metadata, timm_state_dict, write_safetensors
from pera_fast.paths import local_path
from pera_fast.weights.files import check_finite, load_safetensors
from pera_fast.weights.load import load_backbone

KEY = "finetune"  # of the metadata that tells the head


def export(model: FineTuner, cfg: Config, path: Path) -> None:
    """Write backbone and head, with sizes, bands, ranges, normalisation, task and classes in the metadata.

    Raises:
        OSError: it could not be written.
    """
    metadata = {**teacher_metadata(cfg), KEY: model.plan.told()}
    write_safetensors(timm_state_dict(model.state_dict(), ""), path, metadata)


def load_tuned(
    weights: str | os.PathLike[str], device: torch.device, precision: str = "fp32", size: int | None = None
) -> tuple[FineTuner, Config]:
    """A fine-tuned network in evaluation mode, and the configuration that its images are read by.

    Args:
        weights: a run of `pera-fast finetune`, its `exported` folder, or the model.safetensors there.
        device: of the network.
        precision: of activations and matrix products.
        size: pixels a side of the network's input; None: as in training.

    Raises:
        UserError: there is no such file, it is damaged, or holds no fine-tuned network; the size is no multiple of
            the patch size.
    """
    path = _file(local_path("--weights", weights))
    state, metadata = load_safetensors(path)
    told = metadata.get(KEY)
    if told is None:
        raise UserError(
            f"--weights {weights}: has no head, only a backbone; train one: pera-fast finetune --weights {weights} ..."
        )
    backbone = load_backbone(path)
    patch = backbone.cfg.model.patch_size
    if size is not None and size % patch:
        near = max(round(size / patch), 1) * patch
        raise UserError(f"--size {size}: must be a multiple of the patch size {patch}; nearest: {near}")
    try:
        plan = HeadPlan.of(told)
        plan = replace(plan, size=size or plan.size)
        cfg = backbone.cfg.with_values({"train.precision": precision})
        with torch.random.fork_rng(devices=[]):
            model = FineTuner(backbone.model, plan, cfg)
        model.load_state_dict(state)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{path}: its head is damaged ({one_line(error, 160)})") from None
    check_finite(state, path)
    return model.requires_grad_(False).eval().to(device), cfg


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    for found in (path / "exported" / "model.safetensors", path / "model.safetensors"):
        if found.is_file():
            return found
    if (path / "config.yaml").is_file():
        raise UserError(f"--weights {path}: the run has exported no fine-tuned model (exported/model.safetensors)")
    raise UserError(f"--weights {path}: no run of `pera-fast finetune`, nor its exported/model.safetensors")
