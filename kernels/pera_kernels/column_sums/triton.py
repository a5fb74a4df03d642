"""Triton kernel of column_sums: each program sums its share of the rows, ``partial_sums`` adds the programs up."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import Variant
from ..launching import on_their_device
from ..packed_triton import why_not
from ..partial_sums.triton import add_up

BLOCK_R, BLOCK_C = 16, 256  # of a tile: 32 values a thread
PROGRAMS = 4  # per multiprocessor
NUM_WARPS = 4

__all__ = ["VARIANTS", "column_sums", "sum_shares", "why_not"]


@triton.jit
def column_sums_kernel(
    x_ptr,  # (R, C)
    sums_ptr,  # (programs, C) float32
    rows,
    programs,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(1)
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(program * BLOCK_R, rows, programs * BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        mask = (row < rows)[:, None] & (col < C)[None, :]
        sums += tl.load(x_ptr + row.to(tl.int64)[:, None] * C + col[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(sums_ptr + program.to(tl.int64) * C + col, tl.sum(sums, 0), mask=col < C)


def column_sums(x: Tensor) -> Tensor:
    """Sums (C,) float32 over the rows of x (R, C)."""
    x = x.contiguous()
    rows, width = x.shape
    most = 4 if not x.is_cuda else PROGRAMS * torch.cuda.get_device_properties(x.device).multi_processor_count
    count = max(min(triton.cdiv(rows, BLOCK_R), most // triton.cdiv(width, BLOCK_C)), 1)
    sums = torch.empty(count, width, dtype=torch.float32, device=x.device)
    sum_shares(x, sums)
    return add_up(sums)


@on_their_device
def sum_shares(
    x: Tensor,  # (R, C), contiguous
    out: Tensor,  # (P, C) float32
) -> int:
    """Fill rows of out with the sums over shares of the rows of x; returns how many: P, or one for BLOCK_R rows."""
    rows, width = x.shape
    count = max(min(triton.cdiv(rows, BLOCK_R), out.shape[0]), 1)
    grid = triton.cdiv(width, BLOCK_C), count
    column_sums_kernel[grid](x, out, rows, count, **_constants(width), num_warps=NUM_WARPS)
    return count


def _constants(width: int) -> dict[str, int]:
    return {"C": width, "BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C}


def _variants() -> list[Variant]:
    signature = {"x_ptr": "*bf16", "sums_ptr": "*fp32", "rows": "i32", "programs": "i32"}
    return [
        Variant(f"{name} bf16", column_sums_kernel, signature, _constants(width), NUM_WARPS)
        for name, width in (("vit_s16", 384), ("vit_b16", 768), ("vit_b16, keys and values", 1536), ("vit_g16", 1024))
    ]


VARIANTS = _variants()
