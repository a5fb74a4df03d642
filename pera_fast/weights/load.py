"""Loads the backbone that `--weights` names."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pera_fast.config import Config, from_yaml, load_config, read_config
from pera_fast.config.keys import did_you_mean
from pera_fast.config.load import recipe_names
from pera_fast.errors import UserError, one_line
from pera_fast.paths import local_path
from pera_fast.weights.backbone import Backbone, filled_backbone, random_backbone
from pera_fast.weights.files import check_finite, load_safetensors, load_torch, parameters
from pera_fast.weights.vit import HEADS, backbone_state

FORMS = (
    "a run's folder, an exported folder, a file (.safetensors, .params, .pt, .pth), a timm model's name, random:RECIPE"
    " or random:RUN"
)
_SUFFIXES = (".safetensors", ".params", ".pt", ".pth", ".bin", ".ckpt")
_KEPT = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "in_chans")


def load_backbone(
    weights: str | os.PathLike[str], heads: int | None = None, seed: int = 0, option: str = "--weights"
) -> Backbone:
    """The backbone that a `--weights` names; of a run or a published checkpoint, the teacher's.

    Args:
        weights: one of `FORMS`. `random:X` has the sizes and settings of a recipe or of other weights X.
        heads: attention heads, for a file that does not say and whose width is unusual.
        seed: of random weights.
        option: what messages call it.

    Raises:
        UserError: there is no such thing, or it is no vision transformer that ours can be; one line says why.
    """
    name = os.fspath(weights)
    if name == "random" or name.startswith("random:"):
        return _random(name.partition(":")[2], seed, option)
    path = local_path(option, name)
    if path.is_dir():
        return _of_folder(path, heads, option)
    if path.is_file():
        return _of_file(path, heads)
    if path.suffix in _SUFFIXES or os.sep in name:
        raise UserError(f"{option} {name}: no such file or folder; wants {FORMS}")
    return _of_timm(name, option)


def load_everything(weights: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All parameters by published names, of a run's newest checkpoint or of a file; none of a backbone alone.

    Raises:
        UserError: a file cannot be read.
    """
    path = Path(weights)
    if path.is_dir():
        newest = sorted((path / "checkpoints").glob("step_*.pt"))[-1:]
        if not newest:
            return {}
        path = newest[0]
    if not path.is_file():
        return {}
    state = load_safetensors(path)[0] if path.suffix == ".safetensors" else parameters(load_torch(path), path)
    return state if any(name.startswith("teacher.") for name in state) else {}


def _random(like: str, seed: int, option: str) -> Backbone:
    if not like:
        raise UserError(f"{option} random: of which sizes? give random:RECIPE, such as random:tiny, or random:RUN")
    if like in recipe_names() or Path(like).suffix in (".yaml", ".yml"):
        cfg = load_config(like)
    elif Path(like).exists():
        cfg = load_backbone(like).cfg
    else:
        hint = did_you_mean(like, recipe_names())
        raise UserError(
            f"{option} random:{like}: no such recipe, file or folder; recipes: {', '.join(recipe_names())}{hint}"
        )
    return random_backbone(cfg.with_values({"train.seed": seed}), f"random:{like}")


def _of_folder(path: Path, heads: int | None, option: str) -> Backbone:
    """The backbone of a run (config.yaml) or of an exported folder (model.safetensors)."""
    exported = path / "model.safetensors"
    if exported.is_file():
        return _of_file(exported, heads)
    if not (path / "config.yaml").is_file():
        raise UserError(f"{option} {path}: neither a run (config.yaml) nor an exported folder (model.safetensors)")
    try:
        cfg = read_config(path / "config.yaml")
    except OSError as error:
        raise UserError(f"{path / 'config.yaml'}: cannot be read ({error.strerror})") from None
    tuned = path / "exported" / "model.safetensors"  # of a fine-tuning: the backbone with its head
    if tuned.is_file():
        return _of_file(tuned, heads)
    teacher = path / "exported" / "teacher.safetensors"
    if teacher.is_file():
        state, _ = load_safetensors(teacher)
        return _filled(cfg, state, str(path))
    newest = sorted((path / "checkpoints").glob("step_*.pt"))[-1:]
    if not newest:
        raise UserError(f"{option} {path}: the run has neither an exported teacher nor a checkpoint yet")
    return _filled(cfg, parameters(load_torch(newest[0]), newest[0]), str(path))


def _of_file(path: Path, heads: int | None) -> Backbone:
    if path.suffix == ".safetensors":
        state, metadata = load_safetensors(path)
        return _described(state, metadata, str(path), heads)
    stored = load_torch(path)
    state, text = parameters(stored, path), stored.get("config")
    if isinstance(stored.get("format"), int) and isinstance(text, str):  # a checkpoint of a run
        return _filled(from_yaml(text), state, str(path))
    return _described(state, {}, str(path), heads)


def _filled(cfg: Config, state: dict[str, Tensor], source: str) -> Backbone:
    taken, _ = backbone_state(state, source)
    check_finite(taken, source)
    return filled_backbone(cfg, taken, source)


def _described(state: dict[str, Tensor], metadata: Mapping[str, Any], source: str, heads: int | None) -> Backbone:
    """A backbone whose settings stand in metadata; what does not is taken from the shapes, or is usual."""
    taken, sizes = backbone_state(state, source)
    check_finite(taken, source)
    told = heads or metadata.get("num_heads") or HEADS.get(sizes.embed_dim)
    if not isinstance(told, int) or sizes.embed_dim % told:
        raise UserError(
            f"{source}: does not say how many attention heads its width of {sizes.embed_dim} has; give --heads N"
        )
    values: dict[str, Any] = {f"model.{key}": getattr(sizes, key) for key in _KEPT if key != "num_heads"}
    values |= {"model.num_heads": told, "views.global_size": sizes.grid * sizes.patch_size}
    channels = sizes.in_chans
    mean, std = ([0.5] * channels, [0.25] * channels) if channels != 3 else (Config().views.mean, Config().views.std)
    values |= {"views.mean": metadata.get("mean") or mean, "views.std": metadata.get("std") or std}
    values["data.depth"] = str(metadata.get("bits") or "auto")
    for key in ("bands", "band_scale", "band_range"):
        if metadata.get(key) is not None:
            values[f"data.{key}"] = metadata[key]
    try:
        cfg = Config(recipe=str(metadata.get("recipe", "vit_b16"))).with_values(values)
        filled = filled_backbone(cfg, taken, source)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{source}: its metadata is damaged ({one_line(error)})") from None
    if "mean" not in metadata:
        filled.notes.append(f"{source}: says nothing of its normalisation; taken: mean {mean}, std {std}")
    return filled


def _of_timm(name: str, option: str) -> Backbone:
    """The model of timm by its name, with its pretrained weights from timm's hub or cache."""
    try:
        import timm
    except Exception as error:  # timm imports torchvision, which may not fit the torch that is here
        raise UserError(
            f"{option} {name}: no such file or folder, and timm, which may know a model of this name, cannot be"
            f" imported ({one_line(error, 120)}); wants {FORMS}"
        ) from None
    if not timm.is_model(name.split(".")[0]):
        raise UserError(f"{option} {name}: no such file, folder or timm model; wants {FORMS}")
    try:
        model: Any = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # no network, no such tag
        raise UserError(f"{option} {name}: timm gives no weights ({one_line(error, 160)})") from None
    told = model.pretrained_cfg
    heads = model.blocks[0].attn.num_heads if hasattr(model, "blocks") else None
    metadata = {"mean": list(told["mean"]), "std": list(told["std"]), "num_heads": heads}
    return _described(dict(model.state_dict()), metadata, f"timm:{name}", None)
