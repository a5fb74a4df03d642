"""Exports a backbone as a folder that timm, onnxruntime and pera-fast load without being told anything else."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pera_fast.config.keys import did_you_mean
from pera_fast.durable import whole_file
from pera_fast.errors import UserError
from pera_fast.interop import model_card, onnx
from pera_fast.model.export import teacher_metadata, timm_state_dict, write_safetensors
from pera_fast.paths import local_path, new_file
from pera_fast.weights.backbone import Backbone
from pera_fast.weights.load import load_backbone

FORMATS = ("timm", "onnx")
ARCHITECTURE = "vit_base_patch16_224"  # timm's plain ViT; the sizes stand in model_args


@dataclass(frozen=True)
class Exported:
    """An exported folder.

    Attributes:
        folder: holds `files`.
        files: names of what was written.
        onnx_error: largest relative difference of onnxruntime's features; None without ONNX.
        notes: what the user should know, a line each.
    """

    folder: Path
    files: tuple[str, ...]
    onnx_error: float | None
    notes: tuple[str, ...]

    @property
    def summary(self) -> str:
        """Lines for the terminal."""
        checked = "" if self.onnx_error is None else f" (ONNX differs from PyTorch by {self.onnx_error:.1e} at most)"
        return "\n".join([*self.notes, f"{self.folder}: {', '.join(self.files)}{checked}"])


def export(
    weights: str | os.PathLike[str] | Backbone,
    out: str | os.PathLike[str],
    formats: Sequence[str] | None = None,
    license_: str | None = None,
    evaluation: str | os.PathLike[str] | None = None,
    heads: int | None = None,
    overwrite: bool = False,
) -> Exported:
    """Export a backbone: `config.json` and `model.safetensors` for timm, `model.onnx`, and a `README.md` of the model.

    Args:
        weights: as of `weights.load.load_backbone`, or a backbone.
        out: the folder.
        formats: of `FORMATS`; None: both, ONNX only where its packages are installed.
        license_: for the README, such as cc-by-4.0.
        evaluation: a report.json of `pera-fast eval`, whose numbers go into the README.
        heads: attention heads, for files that do not say.
        overwrite: replace files that are there.

    Raises:
        UserError: wrong weights or formats, a package is missing, or the folder cannot be written.
    """
    folder = local_path("--out", out)
    wanted, notes = _formats(formats)
    told = None if evaluation is None else model_card.read_evaluation(Path(evaluation))
    backbone = weights if isinstance(weights, Backbone) else load_backbone(weights, heads)
    names = ["model.safetensors", "config.json", *(["model.onnx"] if "onnx" in wanted else []), "README.md"]
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file; give a folder")
    for name in names:
        new_file("", folder / name, overwrite)
    metadata, error = teacher_metadata(backbone.cfg), None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(timm_state_dict(backbone.model.state_dict(), ""), folder / "model.safetensors", metadata)
        _write(folder / "config.json", json.dumps(timm_config(backbone, license_), indent=2) + "\n")
        if "onnx" in wanted:
            error = onnx.write_onnx(backbone, folder / "model.onnx", {**metadata, **ONNX_NOTES})
        _write(folder / "README.md", model_card.text(backbone, license_, told, error))
    except OSError as problem:
        raise UserError(f"--out {folder}: cannot be written ({problem.strerror or problem})") from None
    return Exported(folder, tuple(names), error, (*backbone.notes, *notes))


ONNX_NOTES = {
    "input": "pixels: float32 [batch, channels, height, width], scaled to [0, 1] by the ranges, not normalised",
    "outputs": "cls [batch, width]; patches [batch, height * width / patch_size ** 2, width], in raster order",
}


def _formats(formats: Sequence[str] | None) -> tuple[tuple[str, ...], list[str]]:
    if formats is None:
        absent = onnx.missing()
        if not absent:
            return FORMATS, []
        return ("timm",), [f"no model.onnx: {', '.join(absent)} is missing (pip install 'pera-fast[onnx]')"]
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"--formats {name}: wants {' or '.join(FORMATS)}{did_you_mean(name, FORMATS)}")
    if "onnx" in formats:
        onnx.require_onnx()
    return tuple(formats), []


def timm_config(backbone: Backbone, license_: str | None = None) -> dict[str, Any]:
    """Contents of config.json, as timm's `local-dir:` and `hf-hub:` sources read it."""
    cfg, model = backbone.cfg, backbone.cfg.model
    size = cfg.views.global_size
    arguments = {
        "img_size": size,
        "patch_size": model.patch_size,
        "in_chans": model.in_chans,
        "embed_dim": model.embed_dim,
        "depth": model.depth,
        "num_heads": model.num_heads,
        "mlp_ratio": model.mlp_ratio,
        "num_classes": 0,
        "global_pool": "token",
        "dynamic_img_size": True,
    }
    return {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": model.embed_dim,
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "pera_fast",
            "custom_load": False,
            "input_size": [model.in_chans, size, size],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": list(cfg.views.mean),
            "std": list(cfg.views.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": None,
            "license": license_ or "unknown",
        },
        "pera_fast": teacher_metadata(cfg),
    }


def _write(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
