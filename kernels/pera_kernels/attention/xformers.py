"""Attention of all groups in one call on a GPU: xformers' memory_efficient_attention with a block-diagonal mask.

xformers picks the fastest operator that is there: Flash-Attention 3 if that is installed, else the one in torch.
"""

import importlib.util
import logging
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from ..packing import pairs, split
from . import varlen
from .arguments import Attended, Packed


@cache
def _fmha() -> Any:
    """The module xformers.ops.fmha, or why it cannot be used (a string)."""
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed: pip install 'pera-fast[cuda13]' (or [cuda12])"
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its five lines about a library that does not load are one clause of `info` here
    try:
        from xformers.ops import fmha
    except Exception as error:  # it was built for another torch, or wants another Flash-Attention
        return f"xformers does not load ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    finally:
        logger.setLevel(level)
    return fmha


@lru_cache(maxsize=16)
def _lacking(device: torch.device, deterministic: bool) -> str | None:
    """Why xformers' Flash-Attention cannot run on a GPU, in xformers' words, or None.

    Mostly its compiled library: a wheel for CUDA 12 does not load beside a torch for CUDA 13, but imports all the same.
    """
    fmha = _fmha()
    q = torch.empty(1, 8, 1, 64, dtype=torch.float16, device=device)
    try:
        operators = fmha.flash.FwOp, fmha.flash.BwOp
        reasons = [reason for op in operators for reason in op.not_supported_reasons(fmha.Inputs(q, q, q))]
    except (AttributeError, TypeError) as error:
        return f"this xformers has another interface than 0.0.35 ({error})"
    if not reasons:
        return None
    return f"xformers says: {'; '.join(dict.fromkeys(reasons))} (see python -m xformers.info)"


def available(device: torch.device) -> str | None:
    """Why this cannot run on a device, or None."""
    if device.type != "cuda":
        return f"xformers attends on a GPU, not on {device.type}"
    if isinstance(_fmha(), str):
        return _fmha()
    return varlen.available(device) or _lacking(device, torch.are_deterministic_algorithms_enabled())


# Flash-Attention is what xformers runs, so it takes the same.
why_not = varlen.why_not


@cache
def _mask(groups: tuple[int, ...], device: torch.device) -> Any:
    """The BlockDiagonalMask of packed groups. Cached: it is made from Python lists and sent to the device.

    Kept as long as the process: a CUDA graph holds addresses in it, so it must not be freed for other groups' sake. It
    is some 40 bytes a sequence.
    """
    return _fmha().BlockDiagonalMask.from_seqlens(varlen.lengths(groups), device=device)


def _store_lse(sums: Tensor, lse: Tensor, groups: Sequence[int]) -> None:
    """Write the log-sum-exps of either of xformers' layouts to lse (T, H).

    Packed (Flash-Attention): (1, H, T or more). Padded (CUTLASS): (sequences, H, longest sequence or more).
    """
    if sums.shape[0] == 1:
        lse.copy_(sums[0, :, : lse.shape[0]].t())
        return
    counts = [count if length else 0 for count, length in pairs(groups)]
    for part, target in zip(sums.split(counts), split(lse, groups), strict=True):
        if target.numel():
            target.copy_(part[:, :, : target.shape[1]].transpose(1, 2))


def forward(packed: Packed, out: Tensor | None, lse: Tensor) -> Tensor:
    """Attention (T, D) of every group, in memory of its own; fills lse (T, H)."""
    qkv, num_heads, groups = packed
    q, k, v = qkv.view(1, qkv.shape[0], 3, num_heads, -1).unbind(2)
    y, sums = _fmha().memory_efficient_attention_forward_requires_grad(q, k, v, _mask(tuple(groups), qkv.device))
    _store_lse(sums, lse, groups)
    return y.reshape(qkv.shape[0], -1)


def backward(grad: Tensor, packed: Packed, attended: Attended, grad_qkv: Tensor) -> None:
    """Fills grad_qkv (T, 3 * D). The packed log-sum-exps make xformers choose a Flash-Attention operator."""
    (qkv, num_heads, groups), (out, lse) = packed, attended
    shape = 1, qkv.shape[0], num_heads, -1
    q, k, v = qkv.view(1, qkv.shape[0], 3, num_heads, -1).unbind(2)
    sums = lse.t().contiguous().unsqueeze(0)
    grads = _fmha().memory_efficient_attention_backward(
        grad.view(shape), out.view(shape), sums, q, k, v, _mask(tuple(groups), qkv.device)
    )
    torch.stack([g.view(shape[1:]) for g in grads], dim=1, out=grad_qkv.view(qkv.shape[0], 3, num_heads, -1))
