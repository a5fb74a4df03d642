"""Triton kernels of attention for short sequences: a tile of rows holds several whole sequences.

Softmax runs over a tile's block diagonal, so one program finishes its sequences: one pass, no streaming maximum, and
the backward pass needs neither the output nor atomics. A tile of 64 rows is 8 sequences of 8 tokens or 2 of 23.
"""

import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import Variant
from ..column_sums.triton import sum_shares
from ..launching import device_of, on_their_device
from ..packing import pairs
from ..partial_sums.triton import add_up
from .arguments import Attended, Packed

MAX_LENGTH = 32
MAX_HEAD_DIM = 128
# The scores' arithmetic grows with BLOCK, the bytes do not; 64 rows are the fewest that a Hopper warpgroup multiplies.
BLOCK = 64

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tile(num_rows, NUM_HEADS: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """Head of the program; its rows (int64), which of them hold tokens, which two belong to one sequence."""
    USED: tl.constexpr = BLOCK // LENGTH * LENGTH
    program = tl.program_id(0).to(tl.int64)
    tile = program // NUM_HEADS
    local = tl.arange(0, BLOCK)
    rows = tile * USED + local
    valid = (local < USED) & (rows < num_rows)
    seq = local // LENGTH
    return program - tile * NUM_HEADS, rows, valid, seq[:, None] == seq[None, :]


@triton.jit
def attention_fwd_kernel(
    qkv_ptr,  # (R, 3, H, d), R = sequences * LENGTH
    out_ptr,  # (R, H, d)
    lse_ptr,  # (R, H) float32
    num_rows,
    scale,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    DIM: tl.constexpr = NUM_HEADS * HEAD_DIM
    head, rows, valid, same = _tile(num_rows, NUM_HEADS, LENGTH, BLOCK)
    cols = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (cols < HEAD_DIM)[None, :]
    within = head * HEAD_DIM + cols[None, :]
    source = qkv_ptr + rows[:, None] * (3 * DIM) + within
    q = tl.load(source, mask=mask, other=0.0)
    k = tl.load(source + DIM, mask=mask, other=0.0)
    v = tl.load(source + 2 * DIM, mask=mask, other=0.0)
    if UPCAST:
        q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
    scores = tl.where(same, scores, float("-inf"))  # rows without a token see each other: all zeros, finite
    top = tl.max(scores, 1)
    p = tl.exp2(scores - top[:, None])
    total = tl.sum(p, 1)
    out = tl.dot(p.to(v.dtype), v, input_precision="ieee") / total[:, None]
    tl.store(out_ptr + rows[:, None] * DIM + within, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + rows * NUM_HEADS + head, (top + tl.log2(total)) * LN2, mask=valid)


@triton.jit
def attention_bwd_kernel(
    grad_ptr,  # (R, H, d)
    qkv_ptr,  # (R, 3, H, d)
    lse_ptr,  # (R, H) float32
    grad_qkv_ptr,  # (R, 3, H, d)
    num_rows,
    scale,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    DIM: tl.constexpr = NUM_HEADS * HEAD_DIM
    head, rows, valid, same = _tile(num_rows, NUM_HEADS, LENGTH, BLOCK)
    cols = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (cols < HEAD_DIM)[None, :]
    within = head * HEAD_DIM + cols[None, :]
    offsets = rows[:, None] * (3 * DIM) + within
    q = tl.load(qkv_ptr + offsets, mask=mask, other=0.0)
    k = tl.load(qkv_ptr + DIM + offsets, mask=mask, other=0.0)
    v = tl.load(qkv_ptr + 2 * DIM + offsets, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + rows[:, None] * DIM + within, mask=mask, other=0.0)
    lse = tl.load(lse_ptr + rows * NUM_HEADS + head, mask=valid, other=0.0)
    if UPCAST:
        q, k, v, grad = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32), grad.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
    p = tl.where(same, tl.exp2(scores - (lse * LOG2E)[:, None]), 0.0)
    grad_v = tl.dot(tl.trans(p.to(grad.dtype)), grad, input_precision="ieee")
    grad_p = tl.dot(grad, tl.trans(v), input_precision="ieee")
    # A row's sum of p * grad_p is its sum of grad * out: whole rows are here, so out is not read.
    delta = tl.sum(p * grad_p, 1)
    grad_scores = (p * (grad_p - delta[:, None]) * scale).to(q.dtype)
    grad_q = tl.dot(grad_scores, k, input_precision="ieee")
    grad_k = tl.dot(tl.trans(grad_scores), q, input_precision="ieee")
    dtype = grad_qkv_ptr.dtype.element_ty
    tl.store(grad_qkv_ptr + offsets, grad_q.to(dtype), mask=mask)
    tl.store(grad_qkv_ptr + DIM + offsets, grad_k.to(dtype), mask=mask)
    tl.store(grad_qkv_ptr + 2 * DIM + offsets, grad_v.to(dtype), mask=mask)


def why_not(qkv: Tensor, num_heads: int) -> str | None:
    """Why these kernels cannot take such projections, or None."""
    if qkv.dtype == torch.float64:
        return "float64 runs in the reference only"
    if qkv.dtype == torch.bfloat16 and qkv.is_cuda and torch.cuda.get_device_capability(qkv.device) < (8, 0):
        return "bfloat16 needs compute capability 8.0"
    head_dim = qkv.shape[1] // (3 * num_heads)
    if head_dim > MAX_HEAD_DIM:
        return f"heads of {head_dim} values do not fit one tile (at most {MAX_HEAD_DIM})"
    return None


def _launches(num_heads: int, head_dim: int, groups: Sequence[int], dtype: torch.dtype):
    """For each group that is not empty: its rows in the packed tensors, the grid, (num_rows, scale), the constants."""
    # The interpreter multiplies bfloat16 as the integers that it stores.
    upcast = dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
    first = 0
    for count, length in pairs(groups):
        last = first + count * length
        if last > first:
            if length > MAX_LENGTH:
                raise ValueError(f"sequences of {length} tokens are not short (at most {MAX_LENGTH})")
            grid = (triton.cdiv(count, BLOCK // length) * num_heads,)
            constants = _constants(num_heads, head_dim, length, upcast)
            yield slice(first, last), grid, (last - first, head_dim**-0.5), constants
        first = last


def _constants(num_heads: int, head_dim: int, length: int, upcast: bool = False) -> dict[str, int | bool]:
    block_d = max(triton.next_power_of_2(head_dim), 16)
    shape = {"NUM_HEADS": num_heads, "HEAD_DIM": head_dim, "LENGTH": length}
    return {**shape, "BLOCK": BLOCK, "BLOCK_D": block_d, "UPCAST": upcast}


@on_their_device
def forward(packed: Packed, out: Tensor | None, lse: Tensor) -> Tensor:
    """Attention (T, D) of groups of at most MAX_LENGTH tokens a sequence, in ``out`` if given; fills lse (T, H)."""
    qkv, num_heads, groups = packed
    head_dim = qkv.shape[1] // (3 * num_heads)
    if out is None:
        out = torch.empty(qkv.shape[0], num_heads * head_dim, dtype=qkv.dtype, device=qkv.device)
    for rows, grid, args, constants in _launches(num_heads, head_dim, groups, qkv.dtype):
        attention_fwd_kernel[grid](qkv[rows], out[rows], lse[rows], *args, **constants, num_warps=4, num_stages=1)
    return out


@on_their_device
def backward(grad: Tensor, packed: Packed, attended: Attended, grad_qkv: Tensor) -> None:
    """Fills grad_qkv (T, 3 * D) from grad (T, D)."""
    (qkv, num_heads, groups), (_, lse) = packed, attended
    head_dim = qkv.shape[1] // (3 * num_heads)
    for rows, grid, args, constants in _launches(num_heads, head_dim, groups, qkv.dtype):
        tensors = grad[rows], qkv[rows], lse[rows], grad_qkv[rows]
        attention_bwd_kernel[grid](*tensors, *args, **constants, num_warps=4, num_stages=1)


@triton.jit
def attention_pack_kernel(
    q_ptr,  # (R, D)
    k_ptr,
    v_ptr,
    out_ptr,  # (R, 3, D)
    sums_ptr,  # (programs, 3, D) float32
    rows,
    programs,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    which = tl.program_id(1)
    program = tl.program_id(2)
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(program * BLOCK_R, rows, programs * BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        mask = (row < rows)[:, None] & (col < D)[None, :]
        place = row.to(tl.int64)[:, None] * D + col[None, :]
        if which == 0:
            x = tl.load(q_ptr + place, mask=mask, other=0.0)
        elif which == 1:
            x = tl.load(k_ptr + place, mask=mask, other=0.0)
        else:
            x = tl.load(v_ptr + place, mask=mask, other=0.0)
        tl.store(out_ptr + row.to(tl.int64)[:, None] * (3 * D) + which * D + col[None, :], x, mask=mask)
        total += x.to(tl.float32)
    tl.store(sums_ptr + (program * 3 + which) * D + col, tl.sum(total, 0), mask=col < D)


PACK_ROWS, PACK_COLUMNS, PACK_PROGRAMS = 16, 256, 4  # tile; programs per multiprocessor


class ColumnSums:
    """Column sums of the gradient of qkv, taken part by part as its rows are written.

    Args:
        parts: how many calls of ``pack`` and ``add`` come at most.
        like: the gradient (T, 3 * D).
    """

    def __init__(self, parts: int, like: Tensor) -> None:
        self.dim, self.done = like.shape[1] // 3, 0
        self.blocks, programs = triton.cdiv(self.dim, PACK_COLUMNS), 2
        if like.is_cuda:
            programs = PACK_PROGRAMS * torch.cuda.get_device_properties(like.device).multi_processor_count
        self.programs = max(programs // (3 * self.blocks), 1)
        shape = parts * self.programs, 3 * self.dim
        self.partial = torch.empty(shape, dtype=torch.float32, device=like.device)

    def pack(self, grads: Sequence[Tensor], out: Tensor) -> None:
        """Write the gradients of q, k and v (n, len, H, d) side by side into out (n, len, 3 * D), and sum it."""
        rows = out.shape[0] * out.shape[1]
        flat = [grad.reshape(rows, self.dim) for grad in grads]  # views: they lie as q does
        programs = max(min(self.programs, triton.cdiv(rows, PACK_ROWS)), 1)
        with device_of(out):
            attention_pack_kernel[(self.blocks, 3, programs)](
                *flat, out, self.partial[self.done :], rows, programs,
                D=self.dim, BLOCK_R=PACK_ROWS, BLOCK_C=PACK_COLUMNS, num_warps=4,
            )  # fmt: skip
        self.done += programs

    def add(self, x: Tensor) -> None:
        """Sum contiguous rows (R, 3 * D) that something else wrote."""
        self.done += sum_shares(x, self.partial[self.done : self.done + self.programs])

    def total(self) -> Tensor:
        """The sums (3 * D,) float32 of what was packed and added so far."""
        return add_up(self.partial[: self.done])


def _variants() -> list[Variant]:
    result = []
    pointers = {f"{name}_ptr": "*bf16" for name in ("q", "k", "v", "out")} | {"sums_ptr": "*fp32"}
    sizes = dict.fromkeys(("rows", "programs"), "i32")
    for recipe, dim in (("vit_s16", 384), ("vit_b16", 768), ("vit_g16", 1024)):
        tile = {"D": dim, "BLOCK_R": PACK_ROWS, "BLOCK_C": PACK_COLUMNS}
        result.append(Variant(f"{recipe} bf16", attention_pack_kernel, {**pointers, **sizes}, tile, num_warps=4))
    scalars = {"lse_ptr": "*fp32", "num_rows": "i32", "scale": "fp32"}
    forward_args = {"qkv_ptr": "*bf16", "out_ptr": "*bf16", **scalars}
    backward_args = {"grad_ptr": "*bf16", "qkv_ptr": "*bf16", "grad_qkv_ptr": "*bf16", **scalars}
    shapes = [("vit_s16", 6, 64), ("vit_b16", 12, 64), ("vit_g16", 16, 64), ("head_dim 32", 6, 32)]
    for recipe, num_heads, head_dim in shapes:
        for length in (8, 23):
            constants = _constants(num_heads, head_dim, length)
            name = f"{recipe} len {length} bf16"
            result.append(Variant(name, attention_fwd_kernel, forward_args, constants, num_warps=4, num_stages=1))
            result.append(Variant(name, attention_bwd_kernel, backward_args, constants, num_warps=4, num_stages=1))
    return result


VARIANTS = _variants()
