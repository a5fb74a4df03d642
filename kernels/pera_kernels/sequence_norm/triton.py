"""Triton kernels of sequence_norm: one pass over the kept rows forward, one backward.

Rows are gathered by arithmetic on the sequence number, so neither a gathered copy nor a row index exists. Two groups
(global, local) share a launch; more groups are launched in pairs. Column sums for weight and bias are kept per program
in registers and reduced once, in a fixed order: no atomics, equal bits on every repeat.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import Variant
from ..packing import kept_groups, num_tokens, pairs

MAX_DIM = 8192  # a row has to fit one block's registers


@triton.jit
def stream_row(row, keep_ptr, kept0, len0, n0, len1, HAS_KEEP: tl.constexpr):
    """Row of the stream that row ``row`` of the kept sequences comes from (both packed; int64)."""
    in_first = row < kept0 * len0
    local = tl.where(in_first, row, row - kept0 * len0)
    length = tl.where(in_first, len0, len1)
    seq = local // length
    offset = local - seq * length
    if HAS_KEEP:
        seq = tl.load(keep_ptr + tl.where(in_first, seq, kept0 + seq)).to(tl.int64)
    return tl.where(in_first, 0, n0 * len0) + seq * length + offset


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
    BLOCK_D: tl.constexpr,
    HAS_KEEP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = stream_row(row, keep_ptr, kept0, len0, n0, len1, HAS_KEEP)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    x = tl.load(x_ptr + source * D + cols, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / D
    centered = tl.where(mask, x - mean, 0.0)  # two passes over registers: no cancellation
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centered * centered, 0) / D + eps)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    y = centered * rstd * weight + bias
    tl.store(y_ptr + row * D + cols, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def sequence_norm_bwd_kernel(
    grad_ptr,  # (R, D)
    x_ptr,  # (T, D) stream
    weight_ptr,  # (D,)
    mean_ptr,  # (R,) float32
    rstd_ptr,  # (R,) float32
    keep_ptr,  # (kept0 + kept1,) int32
    grad_x_ptr,  # (T, D), zero in rows that are not kept
    partial_ptr,  # (programs, 2, D) float32: sums for weight and bias
    rows,
    kept0,
    len0,
    n0,
    len1,
    rows_per_program,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_KEEP: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    sum_weight = tl.zeros((BLOCK_D,), tl.float32)
    sum_bias = tl.zeros((BLOCK_D,), tl.float32)
    first = program * rows_per_program
    for row in range(first, tl.minimum(first + rows_per_program, rows)):
        source = stream_row(row, keep_ptr, kept0, len0, n0, len1, HAS_KEEP)
        grad = tl.load(grad_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + source * D + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        xhat = tl.where(mask, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
        scaled = grad * weight
        mean_scaled = tl.sum(scaled, 0) / D
        mean_product = tl.sum(scaled * xhat, 0) / D
        grad_x = (scaled - mean_scaled - xhat * mean_product) * rstd
        tl.store(grad_x_ptr + source * D + cols, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        sum_weight += grad * xhat
        sum_bias += grad
    tl.store(partial_ptr + (program * 2) * D + cols, sum_weight, mask=mask)
    tl.store(partial_ptr + (program * 2 + 1) * D + cols, sum_bias, mask=mask)


def why_not(x: Tensor) -> str | None:
    """Why these kernels cannot take a stream, or None."""
    if x.dtype == torch.float64:
        return "float64 runs in the reference only"
    if x.shape[1] > MAX_DIM:
        return f"a row of {x.shape[1]} values does not fit one block (at most {MAX_DIM})"
    return None


def _launches(groups: Sequence[int], kept: Sequence[int] | None) -> list[tuple[int, int, int, tuple[int, ...]]]:
    """For each pair of groups: first stream row, first kept sequence, first kept row, (rows, kept0, len0, n0, len1)."""
    shapes, counts = pairs(groups), [n for n, _ in pairs(kept_groups(groups, kept))]
    launches, stream, sequence, row = [], 0, 0, 0
    for i in range(0, len(shapes), 2):
        (n0, len0), kept0 = shapes[i], counts[i]
        (n1, len1), kept1 = (shapes[i + 1], counts[i + 1]) if i + 1 < len(shapes) else ((0, 1), 0)
        rows = kept0 * len0 + kept1 * len1
        if rows:
            launches.append((stream, sequence, row, (rows, kept0, max(len0, 1), n0, max(len1, 1))))
        stream, sequence, row = stream + n0 * len0 + n1 * len1, sequence + kept0 + kept1, row + rows
    return launches


def _num_warps(block: int) -> int:
    return min(max(block // 256, 1), 16)


def sequence_norm(
    x: Tensor,  # (T, D)
    weight: Tensor,  # (D,)
    bias: Tensor,  # (D,)
    eps: float,
    keep: Tensor | None,  # (sum(kept),) int32
    groups: Sequence[int],
    kept: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward: normalised kept rows (R, D) in the dtype of x, mean and rstd (R,) float32."""
    x, dim = x.contiguous(), x.shape[1]
    total = num_tokens(kept_groups(groups, None if keep is None else kept))
    y = torch.empty(total, dim, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(total, dtype=torch.float32, device=x.device) for _ in range(2))
    block = triton.next_power_of_2(dim)
    for stream, sequence, row, args in _launches(groups, None if keep is None else kept):
        sequence_norm_fwd_kernel[(args[0],)](
            x[stream:], weight, bias, x if keep is None else keep[sequence:],
            y[row:], mean[row:], rstd[row:], *args, eps,
            D=dim, BLOCK_D=block, HAS_KEEP=keep is not None, num_warps=_num_warps(block),
        )  # fmt: skip
    return y, mean, rstd


def sequence_norm_backward(
    grad: Tensor,  # (R, D)
    x: Tensor,  # (T, D)
    weight: Tensor,  # (D,)
    mean: Tensor,  # (R,) float32
    rstd: Tensor,  # (R,) float32
    keep: Tensor | None,
    groups: Sequence[int],
    kept: Sequence[int],
) -> list[Tensor]:
    """Gradients of x (T, D), weight (D,) and bias (D,)."""
    x, grad, dim = x.contiguous(), grad.contiguous(), x.shape[1]
    grad_x = torch.empty_like(x) if keep is None else torch.zeros_like(x)
    block = triton.next_power_of_2(dim)
    launches = _launches(groups, None if keep is None else kept)
    sums = torch.zeros(2, dim, dtype=torch.float32, device=x.device)
    for stream, sequence, row, args in launches:
        programs = min(args[0], _programs(x.device))
        per_program = triton.cdiv(args[0], programs)
        partial = torch.empty(programs, 2, dim, dtype=torch.float32, device=x.device)
        sequence_norm_bwd_kernel[(programs,)](
            grad[row:], x[stream:], weight, mean[row:], rstd[row:], x if keep is None else keep[sequence:],
            grad_x[stream:], partial, *args, per_program,
            D=dim, BLOCK_D=block, HAS_KEEP=keep is not None, num_warps=_num_warps(block),
        )  # fmt: skip
        sums += partial.sum(0)
    sum_weight, sum_bias = (
        part.clone() for part in sums.to(weight.dtype)
    )  # an op must not return two views of one tensor
    return [grad_x, sum_weight, sum_bias]


def _programs(device: torch.device) -> int:
    """Programs of the backward pass: some per multiprocessor, few enough that the partial sums stay small."""
    if device.type != "cuda":
        return 4
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


def _variants() -> list[Variant]:
    result = []
    for recipe, dim in (("vit_s16", 384), ("vit_b16", 768), ("vit_g16", 1024)):
        block = triton.next_power_of_2(dim)
        sizes = dict.fromkeys(("rows", "kept0", "len0", "n0", "len1"), "i32")
        half, full = "*bf16", "*fp32"
        shared = {"x_ptr": half, "weight_ptr": full, "mean_ptr": full, "rstd_ptr": full, "keep_ptr": "*i32", **sizes}
        constants = {"D": dim, "BLOCK_D": block, "HAS_KEEP": True}
        forward = {**shared, "bias_ptr": full, "y_ptr": half, "eps": "fp32"}
        backward = {**shared, "grad_ptr": half, "grad_x_ptr": half, "partial_ptr": full, "rows_per_program": "i32"}
        warps = _num_warps(block)
        result.append(Variant(f"{recipe} bf16", sequence_norm_fwd_kernel, forward, constants, warps))
        result.append(Variant(f"{recipe} bf16", sequence_norm_bwd_kernel, backward, constants, warps))
    return result


VARIANTS = _variants()
