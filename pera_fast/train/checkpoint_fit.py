"""Checks that a checkpoint's contents are those of a run, before anything is taken from them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_MOMENTS = ("exp_avg", "exp_avg_sq")


def misfit(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> str:
    """The first thing in a checkpoint (`CheckpointState`) that does not fit the run, in a few words; empty: all fits.

    PyTorch's `load_state_dict` checks names and shapes of weights, but neither their types and values nor what an
    optimiser's state consists of: that would end the first step with a traceback, or spoil it without a word.
    """
    return (
        _weights_misfit(model.state_dict(), state["model"])
        or _groups_misfit(optimizer.state_dict()["param_groups"], state["optimizer"].get("param_groups"))
        or _moments_misfit(
            [p for group in optimizer.param_groups for p in group["params"]], state["optimizer"].get("state")
        )
    )


def _weights_misfit(own: Mapping[str, Tensor], stored: Mapping[str, Any]) -> str:
    for name in own.keys() | stored.keys():
        if name not in stored or name not in own:
            return f"{name!s:.100} is {'missing' if name in own else 'not of this model'}"
        if why := _unlike(own[name], stored[name], finite=True):
            return f"{name} {why}"
    return ""


def _groups_misfit(own: list[dict[str, Any]], stored: Any) -> str:
    if not isinstance(stored, list) or len(stored) != len(own):
        return "the optimiser's param_groups are missing"
    for mine, theirs in zip(own, stored, strict=True):
        if not isinstance(theirs, Mapping) or theirs.get("params") != mine["params"]:
            return "the optimiser's params are others"
        for key, value in mine.items():
            if not _alike(value, theirs.get(key)):
                return f"the optimiser's {key} is {theirs.get(key)!r:.60}"
    return ""


def _alike(own: Any, stored: Any) -> bool:
    """Whether a setting of the optimiser is of its kind: numbers may have changed."""
    if isinstance(own, (list, tuple)):
        return isinstance(stored, (list, tuple)) and len(own) == len(stored) and all(map(_alike, own, stored))
    if isinstance(own, (int, float)) and not isinstance(own, bool):
        return isinstance(stored, (int, float)) and not isinstance(stored, bool) and abs(stored) < float("inf")
    return type(own) is type(stored)


def _moments_misfit(parameters: list[Tensor], stored: Any) -> str:
    if not isinstance(stored, Mapping) or not set(stored) <= set(range(len(parameters))):
        return "the optimiser's state is of other parameters"
    for number, moments in stored.items():
        where = f"the optimiser's state of parameter {number}"
        if not isinstance(moments, Mapping) or not {"step", *_MOMENTS} <= set(moments):
            return f"{where} is not complete"
        if why := _unlike(torch.ones(()), moments["step"], finite=True):
            return f"{where}: step {why}"
        for name in _MOMENTS:
            if why := _unlike(parameters[number], moments[name], finite=False):
                return f"{where}: {name} {why}"
    return ""


def _unlike(own: Tensor, stored: Any, finite: bool) -> str:
    """Difference of a stored tensor from one of its place; moments may overflow, but are no NaN."""
    if not isinstance(stored, Tensor) or stored.layout != torch.strided:
        return f"is no tensor but {type(stored).__name__}"
    if stored.shape != own.shape or stored.dtype != own.dtype:
        return f"is {stored.dtype} {tuple(stored.shape)} instead of {own.dtype} {tuple(own.shape)}"
    if stored.numel() and stored.is_floating_point():
        low, high = (bound.item() for bound in torch.aminmax(stored))
        if low != low or (finite and max(-low, high) == float("inf")):
            return "is not finite"
    return ""
