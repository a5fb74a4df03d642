"""Triton kernels of mask_tokens; the sums over positions are those of embed_tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import packed_triton as packed
from ..aot import Variant
from ..embed_tokens.triton import NUM_WARPS, position_sums, tile
from ..launching import on_their_device
from ..partial_sums.triton import add_up

why_not = packed.why_not


@triton.jit
def mask_tokens_fwd_kernel(
    tokens_ptr,  # (N * length, D)
    mask_token_ptr,  # (D,)
    pos_ptr,  # (1 + L, D)
    index_ptr,  # (N, n) int32
    out_ptr,  # (N * (length + n), D)
    rows,
    length,
    n,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    inside = row < rows
    seq = row // (length + n)
    i = row - seq * (length + n)
    is_old = inside & (i < length)
    is_new = inside & (i >= length)
    position = 1 + tl.load(index_ptr + seq * n + i - length, mask=is_new, other=0).to(tl.int64)
    old = tl.load(
        tokens_ptr + (seq.to(tl.int64) * length + i)[:, None] * D + cols,
        mask=is_old[:, None] & (cols < D),
        other=0.0,
    )
    pos = tl.load(pos_ptr + position[:, None] * D + cols, mask=is_new[:, None] & (cols < D), other=0.0).to(tl.float32)
    mask_token = tl.load(mask_token_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    out = tl.where(is_old[:, None], old.to(tl.float32), mask_token + pos).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row.to(tl.int64)[:, None] * D + cols, out, mask=inside[:, None] & (cols < D))


@triton.jit
def mask_tokens_bwd_kernel(
    grad_ptr,  # (N * (length + n), D)
    grad_tokens_ptr,  # (N * length, D)
    rows,
    length,
    n,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    cols = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    mask = (row < rows)[:, None] & (cols < D)
    source = row + row.to(tl.int32) // length * n
    grad = tl.load(grad_ptr + source[:, None] * D + cols, mask=mask, other=0.0)
    tl.store(grad_tokens_ptr + row[:, None] * D + cols, grad, mask=mask)


@on_their_device
def mask_tokens(
    tokens: Tensor,  # (N * length + rest, D)
    mask_token: Tensor,  # (D,)
    pos: Tensor,  # (1 + L, D)
    index: Tensor,  # (N, n) int32
    rest: int,
) -> Tensor:
    """Forward: (N * (length + n) + rest, D) in the dtype of tokens."""
    tokens, pos, index = tokens.contiguous(), pos.contiguous(), index.contiguous()
    (sequences, n), dim = index.shape, tokens.shape[1]
    old = tokens.shape[0] - rest
    rows = old + sequences * n
    out = torch.empty(rows + rest, dim, dtype=tokens.dtype, device=tokens.device)
    if rest:
        out[rows:] = tokens[old:]
    block_rows, block = tile(dim)
    if rows:
        mask_tokens_fwd_kernel[(triton.cdiv(rows, block_rows), triton.cdiv(dim, block))](
            tokens, mask_token.contiguous(), pos, index, out, rows, old // sequences, n,
            D=dim, BLOCK_R=block_rows, BLOCK_D=block, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


@on_their_device
def mask_tokens_backward(
    grad: Tensor,  # (N * (length + n) + rest, D)
    pos: Tensor,  # (1 + L, D)
    index: Tensor,  # (N, n) int32
    rest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tokens (N * length + rest, D), mask_token (D,) and pos (1 + L, D)."""
    grad, dim = grad.contiguous(), grad.shape[1]
    sequences, n = index.shape
    grown = grad.shape[0] - rest
    length = grown // sequences - n
    rows = sequences * length
    grad_tokens = torch.empty(rows + rest, dim, dtype=grad.dtype, device=grad.device)
    if rest:
        grad_tokens[rows:] = grad[grown:]
    block_rows, block = tile(dim)
    if rows:
        mask_tokens_bwd_kernel[(triton.cdiv(rows, block_rows), triton.cdiv(dim, block))](
            grad, grad_tokens, rows, length, n, D=dim, BLOCK_R=block_rows, BLOCK_D=block, num_warps=NUM_WARPS
        )
    sums, _ = position_sums(grad[:grown], index, pos.shape[0], length, cls=False)
    return grad_tokens, add_up(sums).to(pos.dtype), sums.to(pos.dtype)


def _variants() -> list[Variant]:
    result = []
    for recipe, dim in (("vit_s16", 384), ("vit_b16", 768), ("vit_g16", 1024)):
        halves = dict.fromkeys(("tokens_ptr", "out_ptr", "grad_ptr", "grad_tokens_ptr"), "*bf16")
        full = dict.fromkeys(("mask_token_ptr", "pos_ptr"), "*fp32")
        signature = {**halves, **full, "index_ptr": "*i32", **dict.fromkeys(("rows", "length", "n"), "i32")}
        block_rows, block = tile(dim)
        constants = {"D": dim, "BLOCK_R": block_rows, "BLOCK_D": block}
        for kernel in (mask_tokens_fwd_kernel, mask_tokens_bwd_kernel):
            result.append(Variant(f"{recipe} bf16", kernel, signature, constants, NUM_WARPS))
    return result


VARIANTS = _variants()
