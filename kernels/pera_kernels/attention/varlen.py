"""Attention of all groups in one call on a GPU: the Flash-Attention operators beneath ``torch.nn.attention.varlen``.

Called as aten operators, so that the log-sum-exps come back and no autograd graph is built; their arguments are the
same in torch 2.10 to 2.13. The backward pass adds up dQ in any order, unless torch.use_deterministic_algorithms is on.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ..packing import pairs
from .arguments import Attended, Packed

aten = torch.ops.aten
MAX_HEAD_DIM = 256
INPLACE = "_flash_attention_forward_no_dropout_inplace"  # spares a copy; not in every torch


def available(device: torch.device) -> str | None:
    """Why this cannot run on a device, or None."""
    if device.type != "cuda":
        return f"Flash-Attention for packed sequences runs on a GPU, not on {device.type}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "Flash-Attention needs compute capability 8.0"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no Flash-Attention"
    return None


def why_not(qkv: Tensor, num_heads: int) -> str | None:
    """Why Flash-Attention cannot take such projections, or None."""
    if qkv.dtype not in (torch.bfloat16, torch.float16):
        return f"Flash-Attention takes bfloat16 and float16, not {qkv.dtype}"
    head_dim = qkv.shape[1] // (3 * num_heads)
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return f"heads of {head_dim} values: Flash-Attention takes multiples of 8 up to {MAX_HEAD_DIM}"
    return None


def lengths(groups: Sequence[int]) -> list[int]:
    """Length of every sequence that is not empty."""
    return [length for count, length in pairs(groups) if length for _ in range(count)]


@cache
def _bounds(groups: tuple[int, ...], device: torch.device) -> tuple[Tensor, int]:
    """cu_seqlens, int32 [sequences + 1], and the longest sequence. Cached: one transfer in a run, not one a block.

    Kept as long as the process: a CUDA graph holds its address, so it must not be freed for other groups' sake. It is
    4 bytes a sequence.
    """
    sizes = lengths(groups)
    cu_seqlens = torch.tensor([0, *sizes]).cumsum(0).int()
    if device.type == "cuda":
        cu_seqlens = cu_seqlens.pin_memory().to(device, non_blocking=True)
    return cu_seqlens, max(sizes)


def forward(packed: Packed, out: Tensor | None, lse: Tensor) -> Tensor:
    """Attention (T, D) of every group, in ``out`` if that is given and PyTorch can write there; fills lse (T, H)."""
    qkv, num_heads, groups = packed
    q, k, v = qkv.view(qkv.shape[0], 3, num_heads, -1).unbind(1)
    bounds, longest = _bounds(tuple(groups), qkv.device)
    given = q, k, v, bounds, bounds, longest, longest, 0.0, False, False
    if out is not None and hasattr(aten, INPLACE):
        y, sums = out, getattr(aten, INPLACE)(out.view(q.shape), *given)
    else:
        y, sums = aten._flash_attention_forward(*given)[:2]
    lse.copy_(sums.t())  # (H, T) in the operator
    return y.flatten(1)


def backward(grad: Tensor, packed: Packed, attended: Attended, grad_qkv: Tensor) -> None:
    """Fills grad_qkv (T, 3 * D) from grad (T, D)."""
    (qkv, num_heads, groups), (out, lse) = packed, attended
    shape = qkv.shape[0], num_heads, -1
    q, k, v = qkv.view(qkv.shape[0], 3, num_heads, -1).unbind(1)
    bounds, longest = _bounds(tuple(groups), qkv.device)
    seed = torch.empty(2, dtype=torch.uint64, device=qkv.device)  # of the dropout: there is none
    grads = aten._flash_attention_backward(
        grad.view(shape), q, k, v, out.view(shape), lse.t().contiguous(),
        bounds, bounds, longest, longest, 0.0, False, seed, seed,
    )  # fmt: skip
    torch.stack(grads, dim=1, out=grad_qkv.view(qkv.shape[0], 3, num_heads, -1))
