"""Triton kernel that adds up the partial sums of another kernel's programs."""

import triton
import triton.language as tl
from torch import Tensor

from ..aot import Variant
from ..launching import on_their_device

BLOCK_C = 16  # columns of a program: 64 bytes of a row, so that a few hundred columns fill the card
BLOCK_P = 256  # partial sums in flight at once
NUM_WARPS = 4

__all__ = ["VARIANTS", "add_up"]


@triton.jit
def add_up_kernel(
    partial_ptr,  # (B, P, C) float32
    total_ptr,  # (B, C) float32
    count,  # P
    stride_b,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    batch = tl.program_id(1).to(tl.int64)
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, count, BLOCK_P):
        row = first + tl.arange(0, BLOCK_P)
        mask = (row < count)[:, None] & (col < C)[None, :]
        place = partial_ptr + batch * stride_b + row.to(tl.int64)[:, None] * C + col[None, :]
        sums += tl.load(place, mask=mask, other=0.0)
    tl.store(total_ptr + batch * C + col, tl.sum(sums, 0), mask=col < C)


@on_their_device
def add_up(partial: Tensor, out: Tensor | None = None) -> Tensor:
    """Sums over the programs.

    Args:
        partial: (P, C) or (B, P, C) float32, the last two dimensions contiguous; P may be 0.
        out: (C,) or (B, C) float32, contiguous, filled; None: a new tensor.

    Returns:
        (C,) or (B, C) float32.
    """
    batches, count, width = (1, *partial.shape) if partial.ndim == 2 else partial.shape
    if out is None:
        out = partial.new_empty(width) if partial.ndim == 2 else partial.new_empty(batches, width)
    constants = _constants(width, count)
    grid = triton.cdiv(width, BLOCK_C), batches
    stride = partial.stride(0) if partial.ndim == 3 else 0
    add_up_kernel[grid](partial, out, count, stride, **constants, num_warps=NUM_WARPS)
    return out


def _constants(width: int, count: int) -> dict[str, int]:
    block = min(BLOCK_P, max(16, triton.next_power_of_2(count)))
    return {"C": width, "BLOCK_P": block, "BLOCK_C": BLOCK_C}


def _variants() -> list[Variant]:
    signature = {"partial_ptr": "*fp32", "total_ptr": "*fp32", "count": "i32", "stride_b": "i32"}
    shapes = (("vit_s16", 384, 256), ("vit_b16", 768, 792), ("vit_b16, of gelu", 3072, 44), ("vit_g16", 1024, 792))
    return [
        Variant(name, add_up_kernel, signature, _constants(width, count), NUM_WARPS) for name, width, count in shapes
    ]


VARIANTS = _variants()
