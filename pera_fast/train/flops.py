"""Model FLOP utilisation: FLOPs of the method's matrix products over the device's published peak.

Counted: multiply-adds (as 2) of matrix products and attention, once for each token that a network sees; in the
student's last block, keys and values of all tokens and the rest for the rows that are read; in the teacher's, what
its cls tokens need. Not counted: recomputation, and what
stochastic depth leaves out. The networks: docs/method.md section 4.
"""

import re

import torch

from pera_fast.config import Config
from pera_fast.train.cards import CARDS

# Dense tensor-core peak for bf16 and fp16 in FLOP/s, by a regular expression for torch's name of the device. A device
# that is not here has no MFU: better none than a guess.
PEAKS = (("H100 PCIe", 756e12), *((card.device, card.half) for card in CARDS))


def device_peak(device: torch.device, precision: str) -> float | None:
    """FLOP/s of the device in this precision, None where unknown (CPUs, fp32, devices that are not listed)."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for device, peak in PEAKS if re.search(device, name)), None)


def _blocks(cfg: Config, length: int, depth: int) -> float:
    """Forward FLOPs of `depth` blocks on one sequence of `length` tokens."""
    D = cfg.model.embed_dim
    dense = length * (8 + 4 * cfg.model.mlp_ratio) * D * D  # qkv and projection; both layers of the MLP
    return depth * (dense + 4 * length * length * D)


def _last_block(cfg: Config, length: int, rows: int) -> float:
    """Forward FLOPs of the last block on one sequence of `length` tokens, of which `rows` are read."""
    D = cfg.model.embed_dim
    dense = length * 4 * D * D + rows * (4 + 4 * cfg.model.mlp_ratio) * D * D  # keys and values; the rest
    return dense + 4 * rows * length * D


def _teachers_last_block(cfg: Config, length: int) -> float:
    """Forward FLOPs of the last block on one sequence of `length` tokens, of which the cls token is read.

    The query meets the keys' weight and the values' weight meets the mean of the tokens
    (``pera_kernels.cls_attention``): no token is projected but the cls token.
    """
    D = cfg.model.embed_dim
    return (8 + 4 * cfg.model.mlp_ratio) * D * D + 4 * cfg.model.num_heads * length * D


def _mlp_head(cfg: Config) -> float:
    """Forward FLOPs of a head's MLP on one row."""
    m = cfg.model
    return 2 * (m.embed_dim * m.head_hidden + m.head_hidden * m.head_hidden + m.head_hidden * m.bottleneck)


def flops_per_image(cfg: Config) -> float:
    """FLOPs of forward and backward for one image's crops (student three times its forward, teacher once)."""
    m, v = cfg.model, cfg.views
    patch = m.in_chans * m.patch_size**2
    embed = 2 * patch * m.embed_dim  # per visible patch
    head = _mlp_head(cfg) + 2 * m.bottleneck * m.prototypes
    student, teacher, embedding = 0.0, 0.0, 0.0
    for crops, size, predicts in ((v.num_global, v.global_size, True), (v.num_local, v.local_size, False)):
        seen, predicted, taught = m.patch_counts((size // m.patch_size) ** 2)
        read = 1 + (predicted if predicts else 0)
        half, late = m.depth // 2, seen + read
        blocks = _blocks(cfg, 1 + seen, half) + _blocks(cfg, late, m.depth - half - 1) + _last_block(cfg, late, read)
        student += crops * ((1 - m.drop_path) * blocks + head)
        if predicts:
            student += crops * predicted * (_mlp_head(cfg) + 2 * m.bottleneck * patch)
        embedding += crops * seen * embed
        blocks = _blocks(cfg, 1 + taught, m.depth - 1) + _teachers_last_block(cfg, 1 + taught)
        teacher += crops * (blocks + head + taught * embed)
    return 3 * student + 2 * embedding + teacher  # pixels take no gradient


FASTEST_MFU = 0.5  # more than any step has reached: 0.45 on an H200 at commit 2d9b0ae, with an FP8 teacher
_UNKNOWN_PEAK = 989.4e12  # for a card that is not listed; the H100's and H200's
_FP32 = 8  # times slower than bf16, at least


def fastest_rate(cfg: Config, device: torch.device) -> float | None:
    """Images/s that a step may reach on the device at most, for what must keep up with it; None on a CPU."""
    if device.type != "cuda":
        return None
    peak = device_peak(device, "bf16") or _UNKNOWN_PEAK
    slower = _FP32 if cfg.train.precision == "fp32" else 1
    return FASTEST_MFU * peak / slower / flops_per_image(cfg)
