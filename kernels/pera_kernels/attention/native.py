"""Attention in bfloat16 on CPUs with AMX or AVX512-BF16: native kernels, one head of one sequence after the other."""

import torch
from torch import Tensor

from .. import backend
from ..isa import Isa, isa
from ..packing import split
from .arguments import Attended, Packed
from .sdpa import heads

_built = backend.needs_native("attention", "attention_backward")


class Native:
    """Native kernels on one kind of matrix instructions."""

    def __init__(self, name: str, needed: Isa, by_default: bool) -> None:
        """Nothing is loaded yet.

        Args:
            name: of the implementation.
            needed: the instruction set that has the products.
            by_default: False: it runs where it is asked for.
        """
        self.name, self.needed, self.by_default = name, needed, by_default

    def available(self, device: torch.device) -> str | None:
        """Why this cannot run on a device, or None."""
        if device.type == "cpu" and isa() < self.needed:
            return f"this processor has no {self.needed.name.replace('_', '-')}, or PERA_MAX_ISA leaves it out"
        if reason := _built(device):
            return reason
        if not self.by_default and backend.wanted("attention") != self.name:
            return "not measured to be faster"
        return None

    def why_not(self, qkv: Tensor, num_heads: int) -> str | None:
        """Why the kernels cannot take such projections, or None."""
        head_dim = qkv.shape[1] // (3 * num_heads)
        if qkv.dtype != torch.bfloat16:
            return f"it takes bfloat16, not {qkv.dtype}"
        return None if head_dim and head_dim % 32 == 0 else f"it takes heads of a multiple of 32 values, not {head_dim}"

    @property
    def _amx(self) -> bool:
        return self.needed == Isa.AMX

    def forward(self, packed: Packed, out: Tensor | None, lse: Tensor) -> Tensor:
        """Attention (T, D) of every group, in ``out`` if that is given; fills lse (T, H)."""
        qkv, num_heads, groups = packed
        if out is None:
            out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
        for x, target, sums in zip(*(split(t, groups) for t in (qkv, out, lse)), strict=True):
            if x.numel():
                (y,) = heads(target, num_heads, 1)
                torch.ops.pera_native.attention(*heads(x, num_heads), y, sums.transpose(1, 2), self._amx)
        return out

    def backward(self, grad: Tensor, packed: Packed, attended: Attended, grad_qkv: Tensor) -> None:
        """Fills grad_qkv (T, 3 * D) from grad (T, D)."""
        (qkv, num_heads, groups), (out, lse) = packed, attended
        for g, x, y, sums, target in zip(*(split(t, groups) for t in (grad, qkv, out, lse, grad_qkv)), strict=True):
            if x.numel():
                (g,), (y,) = heads(g, num_heads, 1), heads(y, num_heads, 1)
                given = g, *heads(x, num_heads), y, sums.transpose(1, 2)
                torch.ops.pera_native.attention_backward(*given, *heads(target, num_heads), self._amx)

    def forward_group(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of one group [n, H, len, d] and the log-sum-exp of each query's scores [n, H, len]."""
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        torch.ops.pera_native.attention(q, k, v, out, lse, self._amx)
        return out, lse

    def backward_group(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q [n, H, len, d], k and v, with the probabilities recomputed from lse."""
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        torch.ops.pera_native.attention_backward(grad, q, k, v, out, lse, *grads, self._amx)
        return grads


amx = Native("amx", Isa.AMX, by_default=True)
avx512_bf16 = Native("avx512_bf16", Isa.AVX512_BF16, by_default=False)
