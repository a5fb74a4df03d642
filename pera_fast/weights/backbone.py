"""A frozen backbone with the settings to feed it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pera_fast.config import Config
from pera_fast.errors import UserError
from pera_fast.model.transformer import VisionTransformer


@dataclass(frozen=True)
class Backbone:
    """A backbone with the settings to feed it.

    Attributes:
        model: the network, float32, without gradients.
        cfg: read are `model` (sizes), `views.global_size`, `views.mean`, `views.std` and `data` (bands, band_scale,
            band_range, depth): images are read and normalised by these, as in the run that trained the weights.
        source: where the weights came from, for messages and reports.
        notes: what was filled in or changed to make them fit, a line each.
    """

    model: VisionTransformer
    cfg: Config
    source: str
    notes: list[str] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Length D of a feature."""
        return self.model.embed_dim


def new_transformer(cfg: Config) -> VisionTransformer:
    """A network of the sizes of a configuration, with initial weights from PyTorch's global generator."""
    model = cfg.model
    return VisionTransformer(
        grid=cfg.views.global_size // model.patch_size,
        patch_size=model.patch_size,
        in_chans=model.in_chans,
        embed_dim=model.embed_dim,
        depth=model.depth,
        num_heads=model.num_heads,
        mlp_ratio=model.mlp_ratio,
    )


def random_backbone(cfg: Config, source: str) -> Backbone:
    """The backbone that a run of this configuration and seed begins with."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(cfg.train.seed)
        model = new_transformer(cfg)
    return Backbone(model.requires_grad_(False).eval(), cfg, source)


def filled_backbone(cfg: Config, state: dict[str, Tensor], source: str) -> Backbone:
    """A backbone of these sizes with these parameters.

    Raises:
        UserError: a parameter is missing or has another shape.
    """
    with torch.device("meta"):
        model = new_transformer(cfg)
    wanted = {name: value.shape for name, value in model.named_parameters()}
    for name, shape in wanted.items():
        if name not in state or state[name].shape != shape:
            has = list(state[name].shape) if name in state else "nothing"
            raise UserError(f"{source}: its {name} is {has}, and its sizes want {list(shape)}")
    model.load_state_dict({name: state[name] for name in wanted}, assign=True)
    return Backbone(model.requires_grad_(False).eval(), cfg, source)
