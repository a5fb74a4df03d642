"""Attention group by group: PyTorch's fused kernels, and the formula in plain PyTorch.

The sequences of a group have one length: to PyTorch's fused attention a group is a dense batch, no mask, no padding.
"""

import torch
from torch import Tensor

from ..packing import split
from ..products import product_dtype
from .arguments import Attended, Packed

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)
# On a CPU, sequences up to this length run as batched products of the formula; measured, see README.md.
FORMULA_LENGTH = 8


def available(device: torch.device) -> str | None:
    """Why this cannot run on a device, or None."""
    if device.type not in ("cpu", "cuda"):
        return f"PyTorch's fused attention runs on CPU and CUDA, not on {device.type}"
    return None


def why_not(qkv: Tensor, num_heads: int) -> str | None:
    """Why PyTorch's fused attention cannot take such projections, or None."""
    if qkv.device.type == "cpu":
        return None
    if qkv.dtype == torch.float64:
        return "PyTorch's fused attention takes no float64 on a GPU"
    alignment, head_dim = 8 if qkv.dtype in HALF else 4, qkv.shape[1] // (3 * num_heads)
    if head_dim % alignment:
        return f"heads of {head_dim} values: PyTorch's fused attention takes multiples of {alignment} in {qkv.dtype}"
    return None


def _is_flash(q: Tensor) -> bool:
    """Whether CUDA's Flash-Attention takes q; else the memory-efficient kernels do."""
    return q.dtype in HALF and q.shape[-1] <= 256 and torch.cuda.get_device_capability(q.device) >= (8, 0)


def heads(part: Tensor, num_heads: int, three: int = 3) -> Tensor:
    """[n, len, 3 * D] -> [3, n, H, len, d] views."""
    n, length, width = part.shape
    return part.view(n, length, three, num_heads, width // (three * num_heads)).permute(2, 0, 3, 1, 4)


def _forward_fused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of one group [n, H, len, d] and the log-sum-exp of each query's scores [n, H, len]."""
    if q.device.type == "cpu":
        if q.shape[2] <= FORMULA_LENGTH:
            return _forward_formula(q, k, v)
        dtype = product_dtype(q.dtype, q.device)
        y, lse = aten._scaled_dot_product_flash_attention_for_cpu(q.to(dtype), k.to(dtype), v.to(dtype))
        return y.to(q.dtype), lse
    if _is_flash(q):
        return aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    y, sums = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    return y, sums[..., : q.shape[2]]  # each head's are padded to a multiple of 32


def _forward_formula(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    scores = q.to(wide) @ k.to(wide).transpose(-2, -1) * q.shape[-1] ** -0.5
    lse = scores.logsumexp(-1)
    return ((scores - lse.unsqueeze(-1)).exp_() @ v.to(wide)).to(q.dtype), lse


def _backward_fused(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v [n, H, len, d], with the probabilities recomputed from lse."""
    length = q.shape[2]
    if q.device.type == "cpu":
        if length <= FORMULA_LENGTH:
            return _backward_formula(grad, q, k, v, out, lse)
        if q.dtype in HALF:  # the kernel's half products are slow: widened around it, it is 2 to 15 times as fast
            grad, q, k, v, out = (t.float() for t in (grad, q, k, v, out))
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(grad, q, k, v, out, lse, 0.0, False)
    if _is_flash(q):
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # of the dropout: there is none
        backward = aten._scaled_dot_product_flash_attention_backward
        # The kernels read the log-sum-exps by pointer, as a contiguous tensor.
        lengths = length, k.shape[2]
        return backward(grad, q, k, v, out, lse.contiguous(), None, None, *lengths, 0.0, False, seed, seed)
    seed = torch.empty(0, dtype=torch.int64, device=q.device)
    padded = torch.nn.functional.pad(lse, (0, -length % 32), value=float("inf")).contiguous()
    backward = aten._scaled_dot_product_efficient_attention_backward
    return backward(grad, q, k, v, None, out, padded, seed, seed, 0.0, [True, True, True, False])[:3]


def _backward_formula(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide, scale = lse.dtype, q.shape[-1] ** -0.5
    q, k, v, grad = (t.to(wide) for t in (q, k, v, grad))
    p = (q @ k.transpose(-2, -1)).mul_(scale).sub_(lse.unsqueeze(-1)).exp_()
    grad_p = grad @ v.transpose(-2, -1)
    delta = (p * grad_p).sum(-1, keepdim=True)  # equals the rows' sums of grad * out
    grad_scores = grad_p.sub_(delta).mul_(p).mul_(scale)
    return grad_scores @ k, grad_scores.transpose(-2, -1) @ q, p.transpose(-2, -1) @ grad


class _PerGroup:
    """An implementation that takes the groups one after the other."""

    def __init__(self, forward_group, backward_group, available, why_not) -> None:
        self.forward_group, self.backward_group = forward_group, backward_group
        self.available, self.why_not = available, why_not

    def forward(self, packed: Packed, out: Tensor | None, lse: Tensor) -> Tensor:
        """Attention (T, D) of every group, in ``out`` if that is given; fills lse (T, H)."""
        qkv, num_heads, groups = packed
        if out is None:
            out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
        for x, target, sums in zip(*(split(t, groups) for t in (qkv, out, lse)), strict=True):
            if x.numel():
                y, part_sums = self.forward_group(*heads(x, num_heads))
                heads(target, num_heads, 1)[0].copy_(y)
                sums.copy_(part_sums.transpose(1, 2))
        return out

    def backward(self, grad: Tensor, packed: Packed, attended: Attended, grad_qkv: Tensor) -> None:
        """Fills grad_qkv (T, 3 * D) from grad (T, D)."""
        (qkv, num_heads, groups), (out, lse) = packed, attended
        for g, x, y, sums, target in zip(*(split(t, groups) for t in (grad, qkv, out, lse, grad_qkv)), strict=True):
            if x.numel():
                (g,), (y,) = heads(g, num_heads, 1), heads(y, num_heads, 1)
                grads = self.backward_group(g, *heads(x, num_heads), y, sums.transpose(1, 2))
                for part, value in zip(heads(target, num_heads), grads, strict=True):
                    part.copy_(value)


def _never(*_) -> None:
    return None


fused = _PerGroup(_forward_fused, _backward_fused, available, why_not)
formula = _PerGroup(_forward_formula, _backward_formula, _never, _never)
