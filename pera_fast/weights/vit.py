"""Turns the parameters of common vision transformers into those of `model.transformer.VisionTransformer`.

timm, DINO, MAE and the authors name them alike but for prefixes, heads and a few parts. Layer scale is multiplied into
the layer before it, a missing qkv bias or cls position is a zero: both give the same network.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from pera_fast.errors import UserError

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1536: 24}  # by width, of the usual ViTs: no checkpoint says
_PREFIXES = ("teacher.backbone.", "student.backbone.", "backbone.", "encoder.", "model.", "trunk.", "visual.")
_BLOCK = r"blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
_TAKEN = re.compile(rf"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)|{_BLOCK}")
_UNUSED = re.compile(
    r"(head|head_dist|fc_norm|pre_logits|cls_head|pred_head|decoder\w*|fc|last_layer|mlp)\.|mask_token$"
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a vision transformer that its parameters tell; the number of heads is not among them."""

    embed_dim: int
    depth: int
    patch_size: int
    in_chans: int
    mlp_ratio: float
    grid: int  # patches a side


def backbone_state(state: dict[str, Tensor], source: str) -> tuple[dict[str, Tensor], Sizes]:
    """Float32 parameters of the backbone, by our names, and its sizes.

    Args:
        state: parameters of a whole checkpoint, of the teacher where there are two networks.
        source: what messages call it.

    Raises:
        UserError: they are of no plain vision transformer; the message names the part that is not taken.
    """
    state = _stripped(state)
    sizes = _sizes(state, source)
    plain = {name: value.detach().float() for name, value in state.items()}
    _fold_layer_scale(plain)
    _fill(plain, sizes)
    odd = [name for name in plain if not _TAKEN.fullmatch(name) and not _UNUSED.match(name)]
    if odd:
        raise UserError(f"{source}: has {odd[0]}, which a plain ViT has not; {len(odd)} such parameter(s)")
    return {name: value.contiguous() for name, value in plain.items() if _TAKEN.fullmatch(name)}, sizes


def _stripped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part under the first prefix under which there is a backbone."""
    for prefix in ("", *_PREFIXES):
        if f"{prefix}patch_embed.proj.weight" in state:
            return {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
    return state


def _sizes(state: dict[str, Tensor], source: str) -> Sizes:
    try:
        width, in_chans, patch, other = state["patch_embed.proj.weight"].shape
        positions = state["pos_embed"].shape[-2]
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{source}: no vision transformer: {error} is missing or has another shape") from None
    blocks = {int(name.split(".")[1]) for name in state if re.match(r"blocks\.\d+\.", name)}
    if blocks != set(range(len(blocks))):
        raise UserError(f"{source}: its blocks are not numbered from 0")
    grid = round((positions - 1) ** 0.5)
    if grid * grid + 1 != positions:
        grid = round(positions**0.5)
    if patch != other or grid * grid not in (positions, positions - 1):
        raise UserError(f"{source}: its patches or its position embedding are not square ({positions} positions)")
    return Sizes(width, len(blocks), patch, in_chans, hidden / width, grid)


def _fold_layer_scale(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", name)]:
        _, block, part, _ = name.split(".")
        layer = f"blocks.{block}." + ("attn.proj" if part == "ls1" else "mlp.fc2")
        gamma = state.pop(name)
        state[f"{layer}.weight"] = state[f"{layer}.weight"] * gamma[:, None]
        state[f"{layer}.bias"] = state[f"{layer}.bias"] * gamma


def _fill(state: dict[str, Tensor], sizes: Sizes) -> None:
    for block in range(sizes.depth):
        state.setdefault(f"blocks.{block}.attn.qkv.bias", torch.zeros(3 * sizes.embed_dim))
    state["pos_embed"] = state["pos_embed"].reshape(1, -1, sizes.embed_dim)
    if state["pos_embed"].shape[1] == sizes.grid**2:  # patches only
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, sizes.embed_dim), state["pos_embed"]], 1)
