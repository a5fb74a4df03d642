"""Chooses the recomputation policy of the backward pass by the memory that a training step takes.

The bytes come from shapes alone. ``pera_fast.profile.simulate`` counts the same step tensor by tensor;
tests/train/test_memory_plan.py holds the two together.
"""

from dataclasses import dataclass

import torch
from torch import nn

from pera_fast.config import Config
from pera_fast.data.loading.decode_on import Decoding
from pera_fast.model.pera import PRECISIONS, PerA

MIB = 2**20
POLICIES = ("none", "cheap", "block")  # fastest first
# Of the memory that is free at the start. Not counted and not measured: buffers of NCCL, kernels that are loaded
# later, libraries' workspaces, gaps where other settings than the measured ones leave more, larger images in a batch.
SPARE = 0.1
# Bytes that the allocator holds for a byte of an image in a step: its gaps, and the memory that a CUDA graph has to
# itself. Measured with vit_b16, policy "none" and a CUDA graph on an H200, commit 2d9b0ae (torch 2.11): batches of 16,
# 64 and 256 reserved 5960, 11532 and 36324 MiB (bench/results/gpu/2-h200-2d9b0ae.json), 1.002, 0.977 and 1.052 of what
# `bytes_per_image` says beside `fixed_bytes`. The other policies were not measured.
HELD = 1.06
DALI_DEPTH = 2  # batches that DALI has under way, each of its stages with buffers of its own (loading/pipeline.py)
NVJPEG_BYTES = 16 * MIB  # that DALI allocates on a GPU for each decoding thread: its device_memory_padding
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
    pixels *= _pixel_bytes(cfg)
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


def step_bytes(cfg: Config, model: PerA, policy: str, batch_size: int) -> float:
    """Bytes that the allocator of a GPU holds for a step of a micro-batch; arguments as of the functions above."""
    return fixed_bytes(model) + HELD * batch_size * bytes_per_image(cfg, policy)


def loader_bytes(cfg: Config, batch_size: int, decoding: Decoding, image_pixels: float) -> float:
    """Bytes that the loader takes on a GPU beside the batch that the step has.

    Args:
        cfg: resolved configuration.
        batch_size: images of a micro-batch on this device.
        decoding: where images are decoded.
        image_pixels: of a file's image, mean.
    """
    v, value = cfg.views, _pixel_bytes(cfg) * cfg.model.in_chans
    crops = value * (v.num_global * v.global_size**2 + v.num_local * v.local_size**2)
    ahead = batch_size * (cfg.data.prefetch + 1) * crops  # those that wait, and the one that is made
    if decoding.on == "cpu":
        return ahead
    return ahead + batch_size * DALI_DEPTH * (crops + value * image_pixels) + decoding.threads * NVJPEG_BYTES


def _pixel_bytes(cfg: Config) -> int:
    """Bytes of a pixel's channel in a crop."""
    return 2 if cfg.data.depth == "16" else 1


def choose_recompute(cfg: Config, model: PerA, device: torch.device, batch_size: int, loader: float = 0.0) -> Choice:
    """The policy for a run: the configured one, or with "auto" the fastest that leaves a tenth of the free memory.

    Free is what no other process has: memory that this one's allocator holds is there for the step.

    Args:
        cfg: resolved configuration.
        model: on any device.
        device: where the steps run.
        batch_size: images of a micro-batch on this device.
        loader: bytes of the loader there; see ``loader_bytes``.
    """
    if cfg.model.recompute != "auto":
        return Choice(cfg.model.recompute, "as configured")
    if device.type != "cuda":
        return Choice("cheap", "memory matters more than a pass over it on a CPU")
    room = (1 - SPARE) * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    for policy in POLICIES:
        needed = step_bytes(cfg, model, policy, batch_size) + loader
        told = f"{needed / 2**30:.1f} GiB of {room / 2**30:.1f}, nine tenths of what is free"
        if needed <= room:
            return Choice(policy, f"step and loader take {told}")
    return Choice(POLICIES[-1], f"a step may not fit: with the loader it takes {told}")
