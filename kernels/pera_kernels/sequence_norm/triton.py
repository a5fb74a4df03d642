"""Triton kernels of sequence_norm: one pass over the kept rows forward, one backward.

Rows are gathered by arithmetic on the sequence number, so neither a gathered copy nor a row index exists. A program
takes several rows at once: enough bytes in flight, and one exchange between warps for all of them. Column sums for
weight and bias are kept per program in registers and reduced once, in a fixed order: no atomics, equal bits on every
repeat.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import packed_triton as packed
from ..aot import Variant
from ..launching import on_their_device
from ..packed_triton import find_kept, program_place, stream_row
from ..packing import kept_groups, num_tokens
from ..partial_sums.triton import add_up

MAX_DIM = 8192  # a row has to fit one block's registers
FORWARD_VALUES = 4096  # of a tile: 32 a thread
STAGES = 3  # of the backward loop: two tiles are on their way while one is summed, in 128 registers
BACKWARD_VALUES = 2048  # of a tile: 8 a thread
ZERO_VALUES = 8192


@triton.jit
def sequence_norm_fwd_kernel(
    x_ptr,  # (T, D) stream
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    keep_ptr,  # (kept0 + kept1,) int32
    y_ptr,  # (R, D)
    mean_ptr,  # (R,) float32
    rstd_ptr,  # (R,) float32
    rows,
    kept0,
    len0,
    n0,
    len1,
    eps,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_KEEP: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    source = stream_row(row, inside, keep_ptr, kept0, len0, n0, len1, HAS_KEEP)
    cols = tl.arange(0, BLOCK_D)[None, :]
    mask = inside[:, None] & (cols < D)
    x = tl.load(x_ptr + source[:, None] * D + cols, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / D
    centered = tl.where(cols < D, x - mean[:, None], 0.0)  # two passes over registers: no cancellation
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centered * centered, 1) / D + eps)
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    y = centered * rstd[:, None] * weight + bias
    tl.store(y_ptr + row.to(tl.int64)[:, None] * D + cols, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean, mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=inside)


@triton.jit
def sequence_norm_bwd_kernel(
    grad_ptr,  # (R, D)
    x_ptr,  # (T, D) stream
    weight_ptr,  # (D,)
    mean_ptr,  # (R,) float32
    rstd_ptr,  # (R,) float32
    keep_ptr,  # (kept0 + kept1,) int32
    grad_x_ptr,  # (T, D); rows that are not kept are left as they are
    weight_sums_ptr,  # (programs, D) float32
    bias_sums_ptr,  # (programs, D) float32
    rows,
    kept0,
    len0,
    n0,
    len1,
    programs,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_D)[None, :]
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    sum_weight = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    sum_bias = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for first in tl.range(program * BLOCK_R, rows, programs * BLOCK_R, num_stages=STAGES):
        row = first + lanes
        inside = row < rows
        source = stream_row(row, inside, keep_ptr, kept0, len0, n0, len1, HAS_KEEP)
        mask = inside[:, None] & (cols < D)
        grad = tl.load(grad_ptr + row.to(tl.int64)[:, None] * D + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + source[:, None] * D + cols, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=inside, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=inside, other=0.0)[:, None]
        xhat = tl.where(mask, (x - mean) * rstd, 0.0)
        scaled = grad * weight
        mean_scaled = (tl.sum(scaled, 1) / D)[:, None]
        mean_product = (tl.sum(scaled * xhat, 1) / D)[:, None]
        grad_x = (scaled - mean_scaled - xhat * mean_product) * rstd
        tl.store(grad_x_ptr + source[:, None] * D + cols, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        sum_weight += grad * xhat
        sum_bias += grad
    out = program.to(tl.int64) * D + tl.arange(0, BLOCK_D)
    inside_row = tl.arange(0, BLOCK_D) < D
    tl.store(weight_sums_ptr + out, tl.sum(sum_weight, 0), mask=inside_row)
    tl.store(bias_sums_ptr + out, tl.sum(sum_bias, 0), mask=inside_row)


@triton.jit
def sequence_norm_zero_kernel(
    keep_ptr,  # (kept0 + kept1,) int32
    out_ptr,  # (T, D), set to zero in sequences that are not kept
    n0,
    len0,
    kept0,
    len1,
    kept1,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    in_first, seq, length, first = program_place(tl.program_id(0), n0, len0, len1, D, BLOCK)
    place = find_kept(seq, keep_ptr + tl.where(in_first, 0, kept0), tl.where(in_first, kept0, kept1), BLOCK_K)
    if place < 0:
        start = (tl.where(in_first, 0, n0 * len0) + seq.to(tl.int64) * length) * D
        i = first + tl.arange(0, BLOCK)
        zeros = tl.zeros((BLOCK,), out_ptr.dtype.element_ty)
        tl.store(out_ptr + start + i, zeros, mask=i < length * D)


def why_not(x: Tensor) -> str | None:
    """Why these kernels cannot take a stream, or None."""
    if x.shape[1] > MAX_DIM:
        return f"a row of {x.shape[1]} values does not fit one block (at most {MAX_DIM})"
    return packed.why_not(x)


def _tile(dim: int, values: int) -> tuple[int, int]:
    """Rows and columns of a tile of about that many values."""
    block = triton.next_power_of_2(dim)
    return min(max(values // block, 1), 16), block


def _num_warps(tile: tuple[int, int], values: int) -> int:
    """Warps for a thread to have ``values`` values."""
    return min(max(tile[0] * tile[1] // (32 * values), 1), 16)


@on_their_device
def sequence_norm(
    x: Tensor,  # (T, D)
    weight: Tensor,  # (D,)
    bias: Tensor,  # (D,)
    eps: float,
    keep: Tensor | None,  # (sum(kept_counts),) int32
    groups: Sequence[int],
    kept_counts: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward: normalised kept rows (R, D) in the dtype of x, mean and rstd (R,) float32."""
    x, weight, bias, dim = x.contiguous(), weight.contiguous(), bias.contiguous(), x.shape[1]
    keep = None if keep is None else keep.contiguous()
    counts_or_all = None if keep is None else kept_counts
    total = num_tokens(kept_groups(groups, counts_or_all))
    y = torch.empty(total, dim, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(total, dtype=torch.float32, device=x.device) for _ in range(2))
    tile = _tile(dim, FORWARD_VALUES)
    for pair in packed.group_pairs(groups, counts_or_all):
        if pair.rows:
            sequence_norm_fwd_kernel[(triton.cdiv(pair.rows, tile[0]),)](
                x[pair.stream :], weight, bias, x if keep is None else keep[pair.sequence :],
                y[pair.row :], mean[pair.row :], rstd[pair.row :],
                pair.rows, pair.kept_counts[0], pair.length[0], pair.n[0], pair.length[1], eps,
                D=dim, BLOCK_R=tile[0], BLOCK_D=tile[1], HAS_KEEP=keep is not None, num_warps=_num_warps(tile, 32),
            )  # fmt: skip
    return y, mean, rstd


@on_their_device
def sequence_norm_backward(
    grad: Tensor,  # (R, D)
    x: Tensor,  # (T, D)
    weight: Tensor,  # (D,)
    mean: Tensor,  # (R,) float32
    rstd: Tensor,  # (R,) float32
    keep: Tensor | None,
    groups: Sequence[int],
    kept_counts: Sequence[int],
) -> list[Tensor]:
    """Gradients of x (T, D), weight (D,) and bias (D,)."""
    x, grad, weight, dim = x.contiguous(), grad.contiguous(), weight.contiguous(), x.shape[1]
    keep = None if keep is None else keep.contiguous()
    grad_x = torch.empty_like(x)
    tile = _tile(dim, BACKWARD_VALUES)
    launches = [pair for pair in packed.group_pairs(groups, None if keep is None else kept_counts) if pair.tokens]
    programs = [min(triton.cdiv(pair.rows, tile[0]), _programs(x.device)) for pair in launches]
    sums = torch.empty(2, sum(programs), dim, dtype=torch.float32, device=x.device)
    done = 0
    for pair, count in zip(launches, programs, strict=True):
        sizes = (pair.kept_counts[0], pair.length[0], pair.n[0], pair.length[1])
        if keep is not None:
            sequence_norm_zero_kernel[(pair.programs(pair.n, dim, ZERO_VALUES),)](
                keep[pair.sequence :], grad_x[pair.stream :],
                pair.n[0], pair.length[0], pair.kept_counts[0], pair.length[1], pair.kept_counts[1],
                D=dim, BLOCK=ZERO_VALUES, BLOCK_K=packed.KEEP_BLOCK, num_warps=4,
            )  # fmt: skip
        if count:
            sequence_norm_bwd_kernel[(count,)](
                grad[pair.row :], x[pair.stream :], weight, mean[pair.row :], rstd[pair.row :],
                x if keep is None else keep[pair.sequence :], grad_x[pair.stream :], sums[0, done:], sums[1, done:],
                pair.rows, *sizes, count,
                D=dim, BLOCK_R=tile[0], BLOCK_D=tile[1], HAS_KEEP=keep is not None, STAGES=STAGES,
                num_warps=_num_warps(tile, 8),
            )  # fmt: skip
        done += count
    return [grad_x, *(add_up(part).to(weight.dtype) for part in sums)]


def _programs(device: torch.device) -> int:
    """Programs of the backward pass: some per multiprocessor, few enough that the partial sums stay small."""
    if device.type != "cuda":
        return 4
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _variants() -> list[Variant]:
    result = []
    for recipe, dim in (("vit_s16", 384), ("vit_b16", 768), ("vit_g16", 1024)):
        half, full = "*bf16", "*fp32"
        sizes = dict.fromkeys(("rows", "kept0", "len0", "n0", "len1"), "i32")
        shared = {"x_ptr": half, "weight_ptr": full, "mean_ptr": full, "rstd_ptr": full, "keep_ptr": "*i32", **sizes}
        forward = {**shared, "bias_ptr": full, "y_ptr": half, "eps": "fp32"}
        sums = dict.fromkeys(("weight_sums_ptr", "bias_sums_ptr"), full)
        backward = {**shared, "grad_ptr": half, "grad_x_ptr": half, **sums, "programs": "i32"}
        zero = {"keep_ptr": "*i32", "out_ptr": half, **sizes, "kept1": "i32"}
        for kernel, signature, values, per_thread, more in (
            (sequence_norm_fwd_kernel, forward, FORWARD_VALUES, 32, {}),
            (sequence_norm_bwd_kernel, backward, BACKWARD_VALUES, 8, {"STAGES": STAGES}),
        ):
            tile = _tile(dim, values)
            constants = {"D": dim, "BLOCK_R": tile[0], "BLOCK_D": tile[1], "HAS_KEEP": True, **more}
            result.append(Variant(f"{recipe} bf16", kernel, signature, constants, _num_warps(tile, per_thread)))
        constants = {"D": dim, "BLOCK": ZERO_VALUES, "BLOCK_K": packed.KEEP_BLOCK}
        result.append(Variant(f"{recipe} bf16", sequence_norm_zero_kernel, zero, constants, 4))
    return result


VARIANTS = _variants()
