"""Attention group by group on a GPU: cuDNN's fused attention, through PyTorch's operators.

The sequences of a group have one length, so a group is a dense batch. Queries, keys and values are read where they lie
in the packed projections; gradients are packed by one kernel that also sums their columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import backend
from ..packing import pairs, split
from . import measured
from .arguments import Attended, Packed

if TYPE_CHECKING:
    from .triton import ColumnSums

aten = torch.ops.aten
MAX_HEAD_DIM = 128
OPERATORS = ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward")


def available(device: torch.device) -> str | None:
    """Why this cannot or should not run on a device, or None."""
    if device.type != "cuda":
        return f"cuDNN's attention runs on a GPU, not on {device.type}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if not all(hasattr(aten, name) for name in OPERATORS) or not torch.backends.cudnn.is_available():
        return "this build of torch has no cuDNN attention"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return "cuDNN's attention needs compute capability 8.0"
    if torch.are_deterministic_algorithms_enabled():
        return "cuDNN's attention adds up the gradient of the queries in any order"
    if backend.wanted("attention") != "cudnn" and measured.fastest(capability) != "cudnn":
        return f"nobody measured it to be the fastest on compute capability {capability[0]}.{capability[1]}"
    return None


def why_not(qkv: Tensor, num_heads: int) -> str | None:
    """Why cuDNN's attention cannot take such projections, or None."""
    if qkv.dtype not in (torch.bfloat16, torch.float16):
        return f"cuDNN's attention takes bfloat16 and float16, not {qkv.dtype}"
    head_dim = qkv.shape[1] // (3 * num_heads)
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return f"heads of {head_dim} values: cuDNN's attention takes multiples of 8 up to {MAX_HEAD_DIM}"
    return None


def _views(part: Tensor, num_heads: int, count: int) -> tuple[Tensor, ...]:
    """``count`` views [n, H, len, d] of a group's packed [n, len, count * D]."""
    n, length, width = part.shape
    return part.view(n, length, count, num_heads, width // (count * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)


def _sums(part: Tensor) -> Tensor:
    """The log-sum-exps of a group, [n, len, H], in the operators' layout [n, H, len]: the same memory."""
    n, length, num_heads = part.shape
    return part.view(n, num_heads, length)


def forward_group(q: Tensor, k: Tensor, v: Tensor, with_lse: bool = True) -> tuple[Tensor, Tensor]:
    """Attention of one group [n, H, len, d], which lies as q does, and log-sum-exps [n, H, len] if they are wanted."""
    y, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, with_lse)[:2]
    return y, lse.reshape(q.shape[:3]) if with_lse else lse  # (n, H, len, 1) in some versions


def backward_group(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v [n, H, len, d], each lying as it does."""
    seed = torch.empty((), dtype=torch.int64, device=q.device)  # of the dropout: there is none
    # No bias and no cumulative lengths, where the operator's schema has tensors.
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse.contiguous().unsqueeze(-1), seed, seed, None, None, None,
        q.shape[2], k.shape[2], 0.0, False,
    )  # fmt: skip


def forward(packed: Packed, out: Tensor | None, lse: Tensor | None) -> Tensor:
    """Attention (T, D) of every group.

    Args:
        packed: the projections.
        out: (T, D), filled; None: where one group is all, the operator's own result is returned.
        lse: (T, H) float32, filled, a group's values as (n, H, len); None: nobody reads them.
    """
    qkv, num_heads, groups = packed
    single = out is None and len([n for n, length in pairs(groups) if n * length]) == 1
    if out is None and not single:
        out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    result = out
    for i, x in enumerate(split(qkv, groups)):
        if not x.numel():
            continue
        q, k, v = _views(x, num_heads, 3)
        y, found = forward_group(q, k, v, lse is not None)
        if lse is not None:
            _sums(split(lse, groups)[i]).copy_(found)
        tokens = y.transpose(1, 2).reshape(x.shape[0] * x.shape[1], -1)  # a view: y lies as q does
        if single:
            result = tokens
        else:
            assert out is not None
            split(out, groups)[i].copy_(tokens.view(x.shape[0], x.shape[1], -1))
    assert result is not None
    return result


def backward(
    grad: Tensor, packed: Packed, attended: Attended, grad_qkv: Tensor, column_sums: ColumnSums | None = None
) -> None:
    """Fills grad_qkv (T, 3 * D) from grad (T, D); ``column_sums`` gets those of grad_qkv."""
    (qkv, num_heads, groups), (out, lse) = packed, attended
    if column_sums is None:
        from .triton import ColumnSums

        column_sums = ColumnSums(len(groups) // 2, grad_qkv)
    for g, x, y, sums, target in zip(*(split(t, groups) for t in (grad, qkv, out, lse, grad_qkv)), strict=True):
        if not x.numel():
            continue
        q, k, v = _views(x, num_heads, 3)
        (g,), (y,) = _views(g, num_heads, 1), _views(y, num_heads, 1)
        grads = backward_group(g, q, k, v, y, _sums(sums))
        column_sums.pack([t.transpose(1, 2) for t in grads], target)
