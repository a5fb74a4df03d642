"""pera::attention: schema, shapes, gradient, and scaled_dot_product_attention per group.

The sequences of a group have one length: to PyTorch's fused attention a group is a plain batch, no mask, no padding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend
from ..packing import check, split

aten = torch.ops.aten
backend.register("attention", "sdpa")


def _heads(part: Tensor, num_heads: int, three: int = 3) -> Tensor:
    """[n, len, 3 * D] -> [3, n, H, len, d] views."""
    n, length, width = part.shape
    return part.view(n, length, three, num_heads, width // (three * num_heads)).permute(2, 0, 3, 1, 4)


def _forward_group(q: Tensor, k: Tensor, v: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Attention of one group [n, H, len, d] and the log-sum-exp of each query's scores [n, H, len]."""
    if name == "sdpa":
        if q.device.type == "cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    scores = q.to(wide) @ k.to(wide).transpose(-2, -1) * q.shape[-1] ** -0.5
    lse = scores.logsumexp(-1)
    return ((scores - lse.unsqueeze(-1)).exp_() @ v.to(wide)).to(q.dtype), lse


def _backward_group(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v [n, H, len, d], with the probabilities recomputed from lse."""
    if name == "sdpa":
        if q.device.type == "cpu":
            backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
            return backward(grad, q, k, v, out, lse, 0.0, False)
        length = q.shape[2]
        unused = torch.empty(0, dtype=torch.uint64, device=q.device)  # the dropout's random state: there is none
        backward = aten._scaled_dot_product_flash_attention_backward
        return backward(grad, q, k, v, out, lse, None, None, length, length, 0.0, False, unused, unused)
    wide, scale = lse.dtype, q.shape[-1] ** -0.5
    q, k, v, grad, out = (t.to(wide) for t in (q, k, v, grad, out))
    p = (q @ k.transpose(-2, -1) * scale - lse.unsqueeze(-1)).exp_()
    grad_p = grad @ v.transpose(-2, -1)
    grad_scores = p * (grad_p - (grad * out).sum(-1, keepdim=True)) * scale
    return grad_scores @ k, grad_scores.transpose(-2, -1) @ q, p.transpose(-2, -1) @ grad


@torch.library.custom_op("pera::attention", mutates_args=())
def _attention(qkv: Tensor, num_heads: int, groups: Sequence[int]) -> tuple[Tensor, Tensor]:
    name = backend.choose("attention", qkv.device)
    name = name if _can_fuse(qkv) else "reference"
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    lse = qkv.new_empty(qkv.shape[0], num_heads, dtype=_wide(qkv))
    for part, part_out, part_lse in zip(split(qkv, groups), split(out, groups), split(lse, groups), strict=True):
        if part.numel() == 0:
            continue
        y, part_sum = _forward_group(*_heads(part, num_heads), name)
        _heads(part_out, num_heads, 1)[0].copy_(y)
        part_lse.copy_(part_sum.transpose(1, 2))
    return out, lse


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _can_fuse(qkv: Tensor) -> bool:
    return qkv.device.type == "cpu" or qkv.dtype in (torch.bfloat16, torch.float16)


@_attention.register_fake
def _(qkv: Tensor, num_heads: int, groups: Sequence[int]) -> tuple[Tensor, Tensor]:
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    return out, qkv.new_empty(qkv.shape[0], num_heads, dtype=_wide(qkv))


@torch.library.custom_op("pera::attention_backward", mutates_args=())
def _backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, groups: Sequence[int]) -> Tensor:
    name = backend.choose("attention", qkv.device)
    name = name if _can_fuse(qkv) else "reference"
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    for g, x, y, stats, result in zip(*(split(t, groups) for t in (grad, qkv, out, lse, grad_qkv)), strict=True):
        if x.numel() == 0:
            continue
        q, k, v = _heads(x, num_heads)
        (g,), (y,) = _heads(g, num_heads, 1), _heads(y, num_heads, 1)
        grads = _backward_group(g, q, k, v, y, stats.transpose(1, 2), name)
        for target, value in zip(_heads(result, num_heads), grads, strict=True):
            target.copy_(value)
    return grad_qkv


@_backward.register_fake
def _(grad, qkv, out, lse, num_heads, groups):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    qkv, ctx.num_heads, ctx.groups = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse)


def _autograd(ctx, grad: Tensor, _lse: Tensor):
    qkv, out, lse = ctx.saved_tensors
    return _backward(grad.contiguous(), qkv, out, lse, ctx.num_heads, ctx.groups), None, None


_attention.register_autograd(_autograd, setup_context=_setup_context)


def attention(qkv: Tensor, num_heads: int, groups: Sequence[int]) -> Tensor:
    """Softmax attention within each packed sequence: ``softmax(q k' / sqrt(d)) v``.

    Args:
        qkv: packed projections [T, 3 * D], contiguous: queries, keys, values, each as heads x head_dim.
        num_heads: heads H; H divides D.
        groups: [n0, len0, n1, len1, ...], see ``pera_kernels.packing``; sequences never attend to each other.

    Returns:
        [T, D] in the dtype of qkv. Scores and sums are float32 (float64 for float64).

    Raises:
        ValueError: the width is not 3 * D with D a multiple of num_heads, or groups do not hold T tokens.
    """
    if qkv.ndim != 2 or qkv.shape[1] % (3 * num_heads):
        raise ValueError(f"qkv {tuple(qkv.shape)} must be [T, 3 * D] with D a multiple of num_heads = {num_heads}")
    check(qkv, None, groups, ())
    return _attention(qkv.contiguous(), num_heads, list(groups))[0]
