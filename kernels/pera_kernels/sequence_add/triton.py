"""Triton kernels of sequence_add: one pass over the stream forward, one over the kept rows backward.

A sequence's rows lie next to each other in the stream and in the branch, so a program takes a block of one sequence's
values; it looks its sequence up among the kept ones, a few hundred numbers that stay in the caches.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import packed_triton as packed
from ..aot import Variant
from ..launching import on_their_device
from ..packed_triton import find_kept, program_place
from ..packing import kept_groups, num_tokens

BLOCK = 2048  # values of a program: two 16-byte accesses a thread and tensor
NUM_WARPS = 4
FWD_WARPS = 8  # with 4 compilers spill a register on compute capability 10.0

why_not = packed.why_not


@triton.jit
def sequence_add_fwd_kernel(
    x_ptr,  # (T, D) stream
    y_ptr,  # (R, D) branch
    keep_ptr,  # (kept0 + kept1,) int32
    out_ptr,  # (T, D)
    n0,
    len0,
    kept0,
    scale0,
    len1,
    kept1,
    scale1,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    in_first, seq, length, first = program_place(tl.program_id(0), n0, len0, len1, D, BLOCK)
    i = first + tl.arange(0, BLOCK)
    mask = i < length * D
    start = (tl.where(in_first, 0, n0 * len0) + seq.to(tl.int64) * length) * D
    x = tl.load(x_ptr + start + i, mask=mask, other=0.0).to(tl.float32)
    place = find_kept(seq, keep_ptr + tl.where(in_first, 0, kept0), tl.where(in_first, kept0, kept1), BLOCK_K)
    branch = (tl.where(in_first, 0, kept0 * len0) + place.to(tl.int64) * length) * D
    y = tl.load(y_ptr + branch + i, mask=mask & (place >= 0), other=0.0).to(tl.float32)
    out = tl.where(place >= 0, x + y * tl.where(in_first, scale0, scale1), x)
    tl.store(out_ptr + start + i, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sequence_add_bwd_kernel(
    grad_ptr,  # (T, D)
    keep_ptr,  # (kept0 + kept1,) int32
    grad_y_ptr,  # (R, D)
    n0,
    len0,
    kept0,
    scale0,
    len1,
    scale1,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    in_first, place, length, first = program_place(tl.program_id(0), kept0, len0, len1, D, BLOCK)
    seq = tl.load(keep_ptr + tl.where(in_first, place, kept0 + place)).to(tl.int64)
    start = (tl.where(in_first, 0, n0 * len0) + seq * length) * D
    branch = (tl.where(in_first, 0, kept0 * len0) + place.to(tl.int64) * length) * D
    i = first + tl.arange(0, BLOCK)
    mask = i < length * D
    grad = tl.load(grad_ptr + start + i, mask=mask, other=0.0).to(tl.float32)
    grad_y = grad * tl.where(in_first, scale0, scale1)
    tl.store(grad_y_ptr + branch + i, grad_y.to(grad_y_ptr.dtype.element_ty), mask=mask)


def _scales(pair: packed.Pair) -> list[float]:
    return [n / k if k else 0.0 for n, k in zip(pair.n, pair.kept_counts, strict=True)]


@on_their_device
def sequence_add(
    x: Tensor,  # (T, D)
    y: Tensor,  # (R, D)
    keep: Tensor,  # (sum(kept_counts),) int32
    groups: Sequence[int],
    kept_counts: Sequence[int],
) -> Tensor:
    """Forward: (T, D) in the dtype of x."""
    x, y, keep, dim = x.contiguous(), y.contiguous(), keep.contiguous(), x.shape[1]
    out = torch.empty_like(x)
    for pair in packed.group_pairs(groups, kept_counts):
        scale0, scale1 = _scales(pair)
        if programs := pair.programs(pair.n, dim, BLOCK):
            sequence_add_fwd_kernel[(programs,)](
                x[pair.stream :], y[pair.row :], keep[pair.sequence :], out[pair.stream :],
                pair.n[0], pair.length[0], pair.kept_counts[0], scale0, pair.length[1], pair.kept_counts[1], scale1,
                D=dim, BLOCK=BLOCK, BLOCK_K=packed.KEEP_BLOCK, num_warps=FWD_WARPS,
            )  # fmt: skip
    return out


@on_their_device
def sequence_add_backward(
    grad: Tensor,  # (T, D)
    keep: Tensor,  # (sum(kept_counts),) int32
    groups: Sequence[int],
    kept_counts: Sequence[int],
) -> Tensor:
    """Gradient of the branch (R, D)."""
    grad, keep, dim = grad.contiguous(), keep.contiguous(), grad.shape[1]
    grad_y = torch.empty(num_tokens(kept_groups(groups, kept_counts)), dim, dtype=grad.dtype, device=grad.device)
    for pair in packed.group_pairs(groups, kept_counts):
        scale0, scale1 = _scales(pair)
        if programs := pair.programs(pair.kept_counts, dim, BLOCK):
            sequence_add_bwd_kernel[(programs,)](
                grad[pair.stream :], keep[pair.sequence :], grad_y[pair.row :],
                pair.n[0], pair.length[0], pair.kept_counts[0], scale0, pair.length[1], scale1,
                D=dim, BLOCK=BLOCK, num_warps=NUM_WARPS,
            )  # fmt: skip
    return grad_y


def _variants() -> list[Variant]:
    result = []
    for recipe, dim in (("vit_s16", 384), ("vit_b16", 768), ("vit_g16", 1024)):
        sizes = dict.fromkeys(("n0", "len0", "kept0", "len1", "kept1"), "i32")
        scales = {"scale0": "fp32", "scale1": "fp32"}
        halves = dict.fromkeys(("x_ptr", "y_ptr", "out_ptr", "grad_ptr", "grad_y_ptr"), "*bf16")
        signature = {**halves, "keep_ptr": "*i32", **sizes, **scales}
        constants = {"D": dim, "BLOCK": BLOCK}
        fwd = {**constants, "BLOCK_K": packed.KEEP_BLOCK}
        result.append(Variant(f"{recipe} bf16", sequence_add_fwd_kernel, signature, fwd, FWD_WARPS))
        result.append(Variant(f"{recipe} bf16", sequence_add_bwd_kernel, signature, constants, NUM_WARPS))
    return result


VARIANTS = _variants()
