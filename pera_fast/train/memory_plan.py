"""Chooses the recomputation policy of the backward pass by the memory that a training step takes.

The bytes come from shapes alone. ``pera_fast.profile.simulate`` counts the same step tensor by tensor;
tests/train/test_memory_plan.py holds the two together.
"""

from dataclasses import dataclass

import torch
from torch import nn

from pera_fast.config import Config
from pera_fast.model.pera import PRECISIONS, PerA

MIB = 2**20
POLICIES = ("none", "cheap", "block")  # fastest first
SPARE = 0.1  # of the device's memory: CUDA's context, workspaces, the allocator's rounding
LOSS_BYTES = 640 * MIB  # pieces of prototypes and logits on a GPU, whatever the batch


@dataclass(frozen=True)
class Choice:
    """A policy of ``model.recompute`` and the reason for it, one clause."""

    policy: str
    reason: str


def fixed_bytes(model: PerA) -> int:
    """Bytes that do not depend on the batch: weights, gradients, moments, half-precision copies, center, losses."""
    weights = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    half = 0 if model.compute_dtype == torch.float32 else 2 * weights
    if model.fp8_teacher:  # one byte instead of two
        half -= sum(m.weight.numel() for m in model.teacher.backbone.blocks[:-1].modules() if isinstance(m, nn.Linear))
    return 4 * (weights + 3 * trained + model.cfg.model.prototypes) + half + LOSS_BYTES


def bytes_per_image(cfg: Config, policy: str) -> float:
    """Bytes of one image at the peak of a step: what the student keeps, and one block's gradients on their way.

    Args:
        cfg: resolved configuration.
        policy: of ``model.recompute``: "none", "cheap" or "block".
    """
    m, v = cfg.model, cfg.views
    early = late = read = pixels = 0
    for crops, size, predicts in ((v.num_global, v.global_size, True), (v.num_local, v.local_size, False)):
        seen, predicted, _ = m.patch_counts((size // m.patch_size) ** 2)
        early += crops * (1 + seen)
        read += crops * (1 + (predicted if predicts else 0))
        late += crops * (1 + seen + (predicted if predicts else 0))
        pixels += crops * size * size * m.in_chans
    value = PRECISIONS[cfg.train.precision].itemsize
    row = value * m.embed_dim
    kept = 1 - m.drop_path
    # Rows of D values that a token of a branch leaves: qkv, the result; the GELU's argument; norms and GELU again.
    branches = {"none": 4 + 2 + 2 * m.mlp_ratio, "cheap": 4 + m.mlp_ratio}
    first, second = m.depth // 2, m.depth - m.depth // 2 - 1
    if policy == "block":
        # One stream a block, and all that a block keeps while its gradients are made.
        blocks = row * (first * early + second * late) + row * late * (2 + kept * branches["cheap"])
    else:
        blocks = row * (2 + kept * branches[policy]) * (first * early + second * late)
        blocks += row * (2 * late + kept * (late * 2 + read * (2 + branches[policy] - 4)))  # the last block
    on_their_way = row * kept * late * (m.mlp_ratio * 2 + 2)
    heads = value * read * (2 * m.head_hidden + 3 * m.bottleneck)
    return blocks + on_their_way + heads + 2 * pixels


def choose_recompute(cfg: Config, model: PerA, device: torch.device, batch_size: int) -> Choice:
    """The policy for a run: the configured one, or with "auto" the fastest that leaves a tenth of the memory free.

    Args:
        cfg: resolved configuration.
        model: on any device.
        device: where the steps run.
        batch_size: images of a micro-batch on this device.
    """
    if cfg.model.recompute != "auto":
        return Choice(cfg.model.recompute, "as configured")
    if device.type != "cuda":
        return Choice("cheap", "memory matters more than a pass over it on a CPU")
    room = (1 - SPARE) * torch.cuda.get_device_properties(device).total_memory
    for policy in POLICIES:
        needed = fixed_bytes(model) + batch_size * bytes_per_image(cfg, policy)
        if needed <= room:
            return Choice(policy, f"a step takes {needed / 2**30:.1f} GiB of {room / 2**30:.1f} that may be used")
    return Choice(POLICIES[-1], f"a step may not fit: {needed / 2**30:.1f} GiB of {room / 2**30:.1f} that may be used")
