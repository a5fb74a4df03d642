"""Fits a backbone's weights to another configuration: other image sizes, other bands."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pera_fast.config import Config
from pera_fast.config.tree import band_key
from pera_fast.errors import UserError
from pera_fast.weights.backbone import Backbone

_SIZES = ("embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size")
_COLORS = ("red", "green", "blue")


@dataclass(frozen=True)
class Adapted:
    """Parameters of a backbone for another configuration.

    Attributes:
        state: float32, by our names.
        notes: what was changed, a line each.
        same_pixels: whether bands and patches are the same, so that weights which make pixels fit too.
    """

    state: dict[str, Tensor]
    notes: tuple[str, ...]
    same_pixels: bool


def adapt(backbone: Backbone, cfg: Config) -> Adapted:
    """Parameters of `backbone` for the sizes and bands of `cfg`.

    Position embeddings are interpolated to its grid (bicubic, antialiased where that gets smaller). Kernels of the
    patch projection go to the bands of the same name or number; other bands get the mean kernel. All are scaled by the
    number of bands before over that after, so that the sum over like bands stays.

    Raises:
        UserError: width, depth, heads, MLP or patch size differ.
    """
    _check_sizes(backbone, cfg)
    state = {name: value.detach().float().cpu().clone() for name, value in backbone.model.state_dict().items()}
    notes = []
    before, after = backbone.model.grid, cfg.views.global_size // cfg.model.patch_size
    if before != after:
        state["pos_embed"] = interpolated(state["pos_embed"], before, after)
        notes.append(f"position embeddings interpolated from {before} x {before} to {after} x {after} patches")
    had, wanted = channel_names(backbone.cfg), channel_names(cfg)
    if had != wanted:
        state["patch_embed.proj.weight"], told = _for_bands(state["patch_embed.proj.weight"], had, wanted)
        notes.append(told)
    return Adapted(state, tuple(notes), had == wanted)


def _check_sizes(backbone: Backbone, cfg: Config) -> None:
    other = [
        (name, getattr(backbone.cfg.model, name), getattr(cfg.model, name))
        for name in _SIZES
        if getattr(backbone.cfg.model, name) != getattr(cfg.model, name)
    ]
    if other:
        told = ", ".join(f"model.{name}={theirs} (here {ours})" for name, theirs, ours in other)
        settings = " ".join(f"model.{name}={theirs}" for name, theirs, _ in other)
        raise UserError(f"{backbone.source}: is of {told}; choose the recipe of these sizes, or give {settings}")


def interpolated(positions: Tensor, before: int, after: int) -> Tensor:
    """Position embeddings [1, 1 + before^2, D] for a grid of `after` patches a side; the cls token's stays."""
    width = positions.shape[-1]
    grid = positions[:, 1:].view(1, before, before, width).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (after, after), mode="bicubic", antialias=after < before)
    return torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).reshape(1, after * after, width)], 1)


def channel_names(cfg: Config) -> list[int | str]:
    """Name of each channel: red, green or blue where it is one, else the band's name or number."""
    chans = cfg.model.in_chans
    names: list[int | str] = [band_key(band) for band in cfg.data.bands or range(1, chans + 1)]
    colors = cfg.rgb_channels()
    if colors is None:  # three of three, else none
        colors = [0, 1, 2] if chans == 3 and not any(isinstance(name, str) for name in names) else []
    for color, channel in zip(_COLORS, colors, strict=False):
        names[channel] = color
    return names


def _for_bands(kernels: Tensor, had: list[int | str], wanted: list[int | str]) -> tuple[Tensor, str]:
    """[D, n, P, P] -> [D, m, P, P], and a line about it."""
    mean = kernels.mean(1)
    chosen = [kernels[:, had.index(name)] if name in had else mean for name in wanted]
    found = [str(name) for name in wanted if name in had]
    rest = len(wanted) - len(found)
    told = f"patch projection from {len(had)} to {len(wanted)} bands: " + (
        f"{', '.join(found)} by name" if found else "none of the same name"
    )
    if rest:
        told += f", the mean kernel for the other {rest}"
    return torch.stack(chosen, 1) * (len(had) / len(wanted)), told
