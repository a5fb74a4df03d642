"""Triton kernels of embed_tokens around PyTorch's matrix products, and the position sums that mask_tokens shares.

Forward: one kernel adds bias, position and cls and packs the sequences. Backward: a table says which token of each
sequence shows a position; one program sums a position's rows, and hands the rows on without cls for the projection's
gradient. Gradients of bias and cls are sums of those sums: no atomics, equal bits on every repeat.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import packed_triton as packed
from ..aot import Variant
from ..launching import on_their_device
from ..partial_sums.triton import add_up

TILE_VALUES = 4096  # of an elementwise program: 32 a thread
SUM_ROWS = 16  # sequences that a program of the sums looks at in one step
SUM_PROGRAMS = 2048  # enough for every multiprocessor; with fewer, the sequences are cut into chunks
TABLE_BLOCK = 1024
NUM_WARPS = 4

why_not = packed.why_not


@triton.jit
def embed_tokens_fwd_kernel(
    product_ptr,  # (N * n, D)
    bias_ptr,  # (D,)
    pos_ptr,  # (1 + L, D)
    cls_ptr,  # (D,)
    index_ptr,  # (N, n) int32
    out_ptr,  # (N * (1 + n), D)
    rows,
    n,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    inside = row < rows
    seq = row // (n + 1)
    j = row - seq * (n + 1) - 1
    is_patch = inside & (j >= 0)
    source = seq * n + j
    position = 1 + tl.load(index_ptr + source, mask=is_patch, other=-1).to(tl.int64)  # 0 for cls
    mask = inside[:, None] & (cols < D)
    patch_mask = is_patch[:, None] & (cols < D)
    product = tl.load(product_ptr + source.to(tl.int64)[:, None] * D + cols, mask=patch_mask, other=0.0).to(tl.float32)
    pos = tl.load(pos_ptr + position[:, None] * D + cols, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    cls = tl.load(cls_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    out = tl.where(is_patch[:, None], product + bias, cls) + pos
    tl.store(out_ptr + row.to(tl.int64)[:, None] * D + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def position_table_kernel(
    index_ptr,  # (N, n) int32, each patch at most once in a row
    table_ptr,  # (positions, N) int32: token of each sequence at a position, -1: none
    sequences,
    n,
    positions,
    first,  # token of the first patch
    HAS_CLS: tl.constexpr,  # token 0 is at position 0
    BLOCK: tl.constexpr,
):
    seq = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    for start in range(0, positions, BLOCK):
        p = start + lanes
        nothing = tl.where(p > 0, -1, 0) if HAS_CLS else tl.full((BLOCK,), -1, tl.int32)
        tl.store(table_ptr + p.to(tl.int64) * sequences + seq, nothing, mask=p < positions)
    tl.debug_barrier()  # the same program's other threads write the same places below
    for start in range(0, n, BLOCK):
        j = start + lanes
        patch = tl.load(index_ptr + seq.to(tl.int64) * n + j, mask=j < n, other=0).to(tl.int64)
        tl.store(table_ptr + (1 + patch) * sequences + seq, first + j, mask=j < n)


@triton.jit
def position_sum_kernel(
    grad_ptr,  # (N * length, D)
    table_ptr,  # (positions, N) int32
    sums_ptr,  # (chunks, positions, D) float32
    patches_ptr,  # (N * n, D): rows of patches, if COPY
    sequences,
    length,
    n,
    positions,
    per_chunk,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COPY: tl.constexpr,
):
    position = tl.program_id(0)
    chunk = tl.program_id(2)
    cols = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    sums = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    end = tl.minimum((chunk + 1) * per_chunk, sequences)
    for start in range(chunk * per_chunk, end, BLOCK_S):
        seq = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        token = tl.load(table_ptr + position.to(tl.int64) * sequences + seq, mask=seq < end, other=-1)
        mask = (token >= 0)[:, None] & (cols < D)
        grad = tl.load(grad_ptr + (seq * length + token)[:, None] * D + cols, mask=mask, other=0.0)
        if COPY:  # token 0 is cls
            tl.store(patches_ptr + (seq * n + token - 1)[:, None] * D + cols, grad, mask=mask & (token > 0)[:, None])
        sums += grad.to(tl.float32)
    out = (chunk.to(tl.int64) * positions + position) * D + cols
    tl.store(sums_ptr + out, tl.sum(sums, 0)[None, :], mask=cols < D)


def tile(dim: int) -> tuple[int, int]:
    """Rows and columns of an elementwise tile."""
    block = packed.columns(dim)
    return min(TILE_VALUES // block, 64), block


@on_their_device
def position_sums(
    grad: Tensor,  # (N * length, D)
    index: Tensor,  # (N, n) int32
    positions: int,
    first: int,
    *,
    cls: bool,
) -> tuple[Tensor, Tensor]:
    """Sums (positions, D) float32 of the token rows at each position, and the rows of patches (N * n, D) if cls.

    Tokens ``first``, ``first + 1`` ... of each sequence show the patches of index, and token 0 position 0 if cls.
    """
    grad, index, dim = grad.contiguous(), index.contiguous(), grad.shape[1]
    sequences, n = index.shape
    block = packed.columns(dim)
    blocks = triton.cdiv(dim, block)
    chunks = max(min(SUM_PROGRAMS // (positions * blocks), triton.cdiv(sequences, SUM_ROWS)), 1)
    per_chunk = SUM_ROWS * triton.cdiv(triton.cdiv(sequences, chunks), SUM_ROWS)
    chunks = max(triton.cdiv(sequences, per_chunk), 1) if sequences else 1
    table = torch.empty(positions, sequences, dtype=torch.int32, device=grad.device)
    sums = torch.empty(chunks, positions, dim, dtype=torch.float32, device=grad.device)
    patches = torch.empty(sequences * n if cls else 0, dim, dtype=grad.dtype, device=grad.device)
    if sequences:
        position_table_kernel[(sequences,)](
            index, table, sequences, n, positions, first, HAS_CLS=cls, BLOCK=TABLE_BLOCK, num_warps=NUM_WARPS
        )
    position_sum_kernel[(positions, blocks, chunks)](
        grad, table, sums, patches, sequences, grad.shape[0] // max(sequences, 1), n, positions, max(per_chunk, 1),
        D=dim, BLOCK_S=SUM_ROWS, BLOCK_D=block, COPY=cls, num_warps=NUM_WARPS,
    )  # fmt: skip
    return (sums.sum(0) if chunks > 1 else sums.view(positions, dim)), patches


@on_their_device
def embed_tokens_pack(
    product: Tensor,  # (N * n, D)
    bias: Tensor,  # (D,)
    pos: Tensor,  # (1 + L, D)
    cls: Tensor,  # (D,)
    index: Tensor,  # (N, n) int32
    out: Tensor,  # (N * (1 + n), D)
) -> None:
    """Write the product's rows with bias and position, cls in front of each sequence, rounded once."""
    product, pos, index = product.contiguous(), pos.contiguous(), index.contiguous()
    sequences, n = index.shape
    dim, rows = product.shape[1], sequences * (1 + n)
    block_rows, block = tile(dim)
    if rows:
        embed_tokens_fwd_kernel[(triton.cdiv(rows, block_rows), triton.cdiv(dim, block))](
            product, bias.contiguous(), pos, cls.contiguous(), index, out, rows, n,
            D=dim, BLOCK_R=block_rows, BLOCK_D=block, num_warps=NUM_WARPS,
        )  # fmt: skip


def embed_tokens_sums(grad: Tensor, pos: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """grad (N * (1 + n), D) -> its rows of patches (N * n, D), gradients of bias (D,) and pos (1 + L, D)."""
    sums, patches = position_sums(grad, index, pos.shape[0], 1, cls=True)
    return patches, add_up(sums[1:]).to(pos.dtype), sums.to(pos.dtype)


def _variants() -> list[Variant]:
    result = []
    for recipe, dim in (("vit_s16", 384), ("vit_b16", 768), ("vit_g16", 1024)):
        halves = dict.fromkeys(("product_ptr", "out_ptr", "grad_ptr", "patches_ptr"), "*bf16")
        full = dict.fromkeys(("bias_ptr", "pos_ptr", "cls_ptr", "sums_ptr"), "*fp32")
        sizes = dict.fromkeys(("rows", "n", "sequences", "positions", "first", "length", "per_chunk"), "i32")
        signature = {**halves, **full, "index_ptr": "*i32", "table_ptr": "*i32", **sizes}
        rows, block = tile(dim)
        pack = {"D": dim, "BLOCK_R": rows, "BLOCK_D": block}
        sums = {"D": dim, "BLOCK_S": SUM_ROWS, "BLOCK_D": block, "COPY": True}
        result.append(Variant(f"{recipe} bf16", embed_tokens_fwd_kernel, signature, pack, NUM_WARPS))
        result.append(Variant(f"{recipe} bf16", position_sum_kernel, signature, sums, NUM_WARPS))
    table = {"HAS_CLS": True, "BLOCK": TABLE_BLOCK}
    return [*result, Variant("all", position_table_kernel, signature, table, NUM_WARPS)]


VARIANTS = _variants()
