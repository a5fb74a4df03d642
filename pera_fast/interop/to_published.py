"""Writes a run's weights in the form of the authors' checkpoints, which their training code goes on from.

Their code loads `model` by name, then `optimizer` and `scaler`, whose entries go by the order of the parameters: mask
token, pixel head, student, teacher.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pera_fast.config import Config, from_yaml
from pera_fast.durable import whole_file
from pera_fast.errors import UserError
from pera_fast.paths import local_path, new_file
from pera_fast.weights.files import load_safetensors, load_torch, parameters

SUFFIX = ".params"
_ORDER = ("s_mask_token", "pred_head.", "student.", "teacher.")
_CENTER = "center"  # theirs is in the loss, and in no checkpoint


@dataclass(frozen=True)
class Written:
    """A published checkpoint that was written.

    Attributes:
        path: the file.
        epoch: passes over the data, as its name for the authors' code would say.
        optimizer: whether AdamW's moments are in it.
    """

    path: Path
    epoch: int
    optimizer: bool

    @property
    def summary(self) -> str:
        """One line for the terminal."""
        what = "weights and AdamW's moments" if self.optimizer else "weights; AdamW begins anew"
        return f"{self.path}: the authors' form, epoch {self.epoch}, {what}"


def convert_back(path: str | Path, out: str | Path, overwrite: bool = False) -> Written:
    """Write all weights of a run as the authors' code stores them.

    Args:
        path: a checkpoint of a run, or the `pera.safetensors` that `published.convert` wrote.
        out: the file, by convention `NAME_epN_auto.params`.
        overwrite: replace a file that is there.

    Raises:
        UserError: the file holds no student, is not of three channels (the authors' code takes no others), or `out`
            cannot be written.
    """
    path, out = local_path("", path), new_file("--out", local_path("--out", out), overwrite)
    stored: dict[Any, Any] = {}
    if path.suffix == ".safetensors":
        state = load_safetensors(path)[0]
    else:
        stored = load_torch(path)
        state = parameters(stored, path)
    state = {name: value for name, value in state.items() if name != _CENTER}
    _check(state, path)
    model = {name: state[name].contiguous() for part in _ORDER for name in state if name.startswith(part)}
    cfg = from_yaml(stored["config"]) if isinstance(stored.get("config"), str) else Config()
    moments = _moments(stored, list(state), list(model))
    epoch = _epoch(stored)
    contents = {
        "model": model,
        "optimizer": {"state": moments, "param_groups": [_group(cfg, len(model))]},
        "scaler": _scaler(stored.get("scaler")),
        "best_loss": math.inf,
        "epoch": epoch,
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(out, sync=True) as partial, open(partial, "wb") as file:
            torch.save(contents, file)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--out {out}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    return Written(out, epoch, bool(moments))


def _check(state: Mapping[str, Tensor], path: Path) -> None:
    missing = [part for part in _ORDER if not any(name.startswith(part) for name in state)]
    if missing:
        raise UserError(
            f"{path}: has no {missing[0]}; the authors' form wants student, teacher and heads: give a checkpoint of a"
            " run (RUN/checkpoints/step_*.pt)"
        )
    odd = [name for name in state if not name.startswith(_ORDER)]
    if odd:
        raise UserError(f"{path}: has {odd[0]}, which the authors' code does not know")
    chans = state["teacher.backbone.patch_embed.proj.weight"].shape[1]
    if chans != 3:
        raise UserError(f"{path}: is of {chans} channels, and the authors' code takes three only")


def _moments(stored: Mapping[Any, Any], ours: list[str], theirs: list[str]) -> dict[int, dict[str, Any]]:
    """AdamW's state by their parameters' numbers; empty where the file has none.

    Ours numbers the trained parameters, theirs all of them, the teacher's without a state.
    """
    told = stored.get("optimizer")
    state = told.get("state") if isinstance(told, Mapping) else None
    if not isinstance(state, Mapping) or "format" not in stored:
        return {}
    trained = [name for name in ours if not name.startswith("teacher.")]
    by_name = {name: state[number] for number, name in enumerate(trained) if number in state}
    return {number: by_name[name] for number, name in enumerate(theirs) if name in by_name}


def _group(cfg: Config, count: int) -> dict[str, Any]:
    """The one parameter group, as PyTorch's AdamW describes it."""
    o = cfg.optim
    parameter = torch.nn.Parameter(torch.empty(0))
    optimizer = torch.optim.AdamW(
        [parameter], lr=o.lr, betas=(o.betas[0], o.betas[1]), eps=o.eps, weight_decay=o.weight_decay
    )
    return {**optimizer.state_dict()["param_groups"][0], "params": list(range(count))}


def _scaler(told: object) -> dict[str, Any]:
    """The state of a GradScaler, which their code always has; as a new one has it where the run had none."""
    if isinstance(told, dict) and told:
        return told
    return {
        "scale": 65536.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 0,
    }


def _epoch(stored: Mapping[Any, Any]) -> int:
    position, images, total = (stored.get(name) for name in ("position", "images", "total_batch"))
    if isinstance(position, int) and isinstance(images, int) and isinstance(total, int) and images >= total > 0:
        return position // (images // total)
    return 0
