"""Starts a run from given weights (`train.init_from`) instead of random ones."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from pera_fast.config import Config
from pera_fast.model.pera import PerA
from pera_fast.weights.adapt import Adapted, adapt
from pera_fast.weights.load import load_backbone, load_everything

log = logging.getLogger(__name__)

_HEAD = "teacher.cls_head."
_PIXELS = "pred_head."


@dataclass(frozen=True)
class Initial:
    """Weights that a run starts from.

    Attributes:
        source: what `train.init_from` names.
        backbone: of student and teacher.
        others: parameters by published names that the source has beside the backbone; empty for a backbone alone.
    """

    source: str
    backbone: Adapted
    others: dict[str, Tensor]


def read_initial(cfg: Config) -> Initial | None:
    """The weights that `train.init_from` names, fitted to the configuration; None: it names none.

    Raises:
        UserError: there are none, or they do not fit.
    """
    if cfg.train.init_from is None:
        return None
    source = cfg.train.init_from
    backbone = load_backbone(source, option="train.init_from")
    return Initial(source, adapt(backbone, cfg), load_everything(source))


@torch.no_grad()
def initialise(model: PerA, initial: Initial) -> None:
    """Put the weights into a new model: both backbones, and the heads, mask token and center where they fit.

    The teacher's head goes to both networks, since a teacher starts equal to its student (docs/method.md section 4.3).
    """
    for branch in (model.student, model.teacher):
        branch.backbone.load_state_dict(initial.backbone.state, strict=False)
    others = initial.others
    taken, new = [], []
    head = {name.removeprefix(_HEAD): value for name, value in others.items() if name.startswith(_HEAD)}
    if _fits(head, model.teacher.cls_head):
        for branch in (model.student, model.teacher):
            branch.cls_head.load_state_dict(head)
        taken.append("cls head")
        if "center" in others and others["center"].shape == model.center.shape:
            model.center.copy_(others["center"])
            taken.append("center")
    else:
        new.append("cls head")
    pixels = {name.removeprefix(_PIXELS): value for name, value in others.items() if name.startswith(_PIXELS)}
    if initial.backbone.same_pixels and _fits(pixels, model.pred_head):
        model.pred_head.load_state_dict(pixels)
        taken.append("pixel head")
    else:
        new.append("pixel head")
    token = others.get("s_mask_token")
    if token is not None and token.shape == model.s_mask_token.shape:
        model.s_mask_token.copy_(token)
        taken.append("mask token")
    else:
        new.append("mask token")
    log.info("weights of %s: %s", initial.source, ", ".join(["backbone", *taken]))
    for note in (*initial.backbone.notes, f"new: {', '.join(new)}" if new else ""):
        if note:
            log.info("%s", note)


def _fits(state: dict[str, Tensor], module: torch.nn.Module) -> bool:
    wanted = module.state_dict()
    return state.keys() == wanted.keys() and all(value.shape == wanted[name].shape for name, value in state.items())
