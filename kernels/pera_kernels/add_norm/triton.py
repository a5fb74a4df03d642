"""Triton kernels of add_norm: the stream is read once and written once, forward and backward.

A program takes whole rows of the stream. Each sequence's place among those that a branch sees comes from a table, so a
row finds its row of the branch without a search. Column sums are kept per program in registers and reduced once, in a
fixed order: no atomics, equal bits on every repeat.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import packed_triton as packed
from ..aot import Variant
from ..launching import on_their_device
from ..packed_triton import Pair, group_pairs
from ..packing import kept_groups, num_tokens
from ..partial_sums.triton import add_up
from ..sequence_norm.triton import MAX_DIM
from .arguments import Norm, Subsets

FORWARD_WARPS = 1
FORWARD_ROWS = 1  # of a tile: a warp has a row, and exchanges nothing with others
BACKWARD_ROWS, BACKWARD_WARPS = 1, 2
BACKWARD_PROGRAMS = 6  # per multiprocessor: what its registers hold at once; more would run one after the other
STAGES = 1  # of the backward loop: other programs' loads are on their way while one sums

__all__ = ["VARIANTS", "add_norm", "add_norm_backward", "why_not"]


@triton.jit
def branch_row(row, inside, place_ptr, kept0, n0, len0, len1, HAS_SUBSET: tl.constexpr):
    """Row (int64) of a branch that a row of the stream belongs to, and whether the branch has it."""
    if HAS_SUBSET:
        in_first = row < n0 * len0
        local = tl.where(in_first, row, row - n0 * len0)
        length = tl.maximum(tl.where(in_first, len0, len1), 1)
        seq = local // length
        place = tl.load(place_ptr + tl.where(in_first, seq, n0 + seq), mask=inside, other=-1)
        found = tl.where(in_first, 0, kept0 * len0) + place.to(tl.int64) * length + (local - seq * length)
        return found, inside & (place >= 0)
    return row.to(tl.int64), inside


@triton.jit
def add_norm_fwd_kernel(
    x_ptr,  # (T, D) stream
    y_ptr,  # (Ra, D) branch
    y_bias_ptr,  # (D,)
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    add_place_ptr,  # (n0 + n1,) int32
    norm_place_ptr,  # (n0 + n1,) int32
    out_ptr,  # (T, D)
    normed_ptr,  # (Rn, D)
    mean_ptr,  # (Rn,) float32
    rstd_ptr,  # (Rn,) float32
    rows,
    n0,
    len0,
    len1,
    add_kept0,
    scale0,
    scale1,
    norm_kept0,
    eps,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD_SUBSET: tl.constexpr,
    NORM_SUBSET: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_STATS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    cols = tl.arange(0, BLOCK_D)[None, :]
    mask = inside[:, None] & (cols < D)
    stream = row.to(tl.int64)[:, None] * D + cols
    x = tl.load(x_ptr + stream, mask=mask, other=0.0).to(tl.float32)
    source, has_y = branch_row(row, inside, add_place_ptr, add_kept0, n0, len0, len1, ADD_SUBSET)
    y = tl.load(y_ptr + source[:, None] * D + cols, mask=has_y[:, None] & (cols < D), other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(y_bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    scale = tl.where(row < n0 * len0, scale0, scale1)
    x = tl.where(has_y[:, None], x + y * scale[:, None], x).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + stream, x, mask=mask)
    if HAS_NORM:
        x = x.to(tl.float32)  # as it is stored: the backward pass starts from that
        mean = tl.sum(x, 1) / D
        centered = tl.where(cols < D, x - mean[:, None], 0.0)  # two passes over registers: no cancellation
        rstd = 1.0 / tl.sqrt_rn(tl.sum(centered * centered, 1) / D + eps)
        weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
        normed = centered * rstd[:, None] * weight + bias
        target, has_norm = branch_row(row, inside, norm_place_ptr, norm_kept0, n0, len0, len1, NORM_SUBSET)
        place = normed_ptr + target[:, None] * D + cols
        tl.store(place, normed.to(normed_ptr.dtype.element_ty), mask=has_norm[:, None] & (cols < D))
        if HAS_STATS:
            tl.store(mean_ptr + target, mean, mask=has_norm)
            tl.store(rstd_ptr + target, rstd, mask=has_norm)


@triton.jit
def add_norm_bwd_kernel(
    grad_ptr,  # (T, D), gradient of the sum
    grad_normed_ptr,  # (Rn, D)
    x_ptr,  # (T, D), the sum
    weight_ptr,  # (D,)
    mean_ptr,  # (Rn,) float32
    rstd_ptr,  # (Rn,) float32
    add_place_ptr,  # (n0 + n1,) int32
    norm_place_ptr,  # (n0 + n1,) int32
    grad_x_ptr,  # (T, D)
    grad_y_ptr,  # (Ra, D)
    sums_ptr,  # (3, programs of all launches, D) float32: of weight, bias, y_bias
    rows,
    n0,
    len0,
    len1,
    add_kept0,
    scale0,
    scale1,
    norm_kept0,
    programs,
    sums_stride,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_ADD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD_SUBSET: tl.constexpr,
    NORM_SUBSET: tl.constexpr,
    HAS_NORM: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)[None, :]
    sum_weight = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    sum_bias = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    sum_branch = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    if HAS_NORM:
        weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    for first in tl.range(program * BLOCK_R, rows, programs * BLOCK_R, num_stages=STAGES):
        row = first + tl.arange(0, BLOCK_R)
        inside = row < rows
        mask = inside[:, None] & (cols < D)
        stream = row.to(tl.int64)[:, None] * D + cols
        if HAS_GRAD:
            grad = tl.load(grad_ptr + stream, mask=mask, other=0.0).to(tl.float32)
        else:
            grad = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        if HAS_NORM:
            source, has_norm = branch_row(row, inside, norm_place_ptr, norm_kept0, n0, len0, len1, NORM_SUBSET)
            seen = has_norm[:, None] & (cols < D)
            grad_normed = tl.load(grad_normed_ptr + source[:, None] * D + cols, mask=seen, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + stream, mask=seen, other=0.0).to(tl.float32)
            mean = tl.load(mean_ptr + source, mask=has_norm, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + source, mask=has_norm, other=0.0)[:, None]
            xhat = tl.where(seen, (x - mean) * rstd, 0.0)
            scaled = grad_normed * weight
            mean_scaled = (tl.sum(scaled, 1) / D)[:, None]
            mean_product = (tl.sum(scaled * xhat, 1) / D)[:, None]
            grad += (scaled - mean_scaled - xhat * mean_product) * rstd
            sum_weight += grad_normed * xhat
            sum_bias += grad_normed
        tl.store(grad_x_ptr + stream, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if HAS_ADD:
            branch = tl.where(mask, grad, 0.0)
            if ADD_SUBSET:
                target, has_y = branch_row(row, inside, add_place_ptr, add_kept0, n0, len0, len1, ADD_SUBSET)
                branch *= tl.where(row < n0 * len0, scale0, scale1)[:, None]
                stored = has_y[:, None] & (cols < D)
                branch = tl.where(stored, branch, 0.0)
                place = grad_y_ptr + target[:, None] * D + cols
                tl.store(place, branch.to(grad_y_ptr.dtype.element_ty), mask=stored)
            if HAS_BIAS:
                sum_branch += branch
    out = sums_ptr + program.to(tl.int64) * D + tl.arange(0, BLOCK_D)
    written = tl.arange(0, BLOCK_D) < D
    if HAS_NORM:
        tl.store(out, tl.sum(sum_weight, 0), mask=written)
        tl.store(out + sums_stride, tl.sum(sum_bias, 0), mask=written)
    if HAS_BIAS:
        tl.store(out + 2 * sums_stride, tl.sum(sum_branch, 0), mask=written)


def why_not(x: Tensor) -> str | None:
    """Why these kernels cannot take a stream, or None."""
    if x.shape[1] > MAX_DIM:
        return f"a row of {x.shape[1]} values does not fit one block (at most {MAX_DIM})"
    return packed.why_not(x)


@dataclass(frozen=True)
class _Launch:
    """One pair of groups: where its parts begin, and the sizes that both kernels take."""

    add: Pair
    norm: Pair
    first: int  # sequence, among all
    sizes: tuple[int | float, ...]


def _launches(
    groups: Sequence[int], add_counts: Sequence[int] | None, norm_counts: Sequence[int] | None
) -> Iterator[_Launch]:
    first = 0
    for add, norm in zip(group_pairs(groups, add_counts), group_pairs(groups, norm_counts), strict=True):
        scales = [n / k if k else 0.0 for n, k in zip(add.n, add.kept_counts, strict=True)]
        yield _Launch(add, norm, first, (add.n[0], *add.length, add.kept_counts[0], *scales, norm.kept_counts[0]))
        first += sum(add.n)


def _places(subset: Tensor | None, kept_counts: Sequence[int], x: Tensor) -> Tensor:
    """The places of a subset; any tensor where there is none."""
    return x if subset is None else subset[sum(kept_counts) :]


@on_their_device
def add_norm(
    x: Tensor,  # (T, D)
    y: Tensor,  # (Ra, D)
    y_bias: Tensor | None,  # (D,)
    norm: Norm,
    subsets: Subsets,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward: the sum (T, D), which is x if ``inplace``, the normalised rows (Rn, D), mean and rstd (Rn,) float32."""
    (weight, bias, eps), (groups, add_subset, add_counts, norm_subset, norm_counts) = norm, subsets
    x, y, dim = x.contiguous(), y.contiguous(), x.shape[1]
    add_counts_or_all = None if add_subset is None else add_counts
    norm_counts_or_all = None if norm_subset is None else norm_counts
    normed_rows = 0 if weight is None else num_tokens(kept_groups(groups, norm_counts_or_all))
    out = x if inplace else torch.empty_like(x)
    normed = x.new_empty(normed_rows, dim)
    mean, rstd = (x.new_empty(0 if inplace else normed_rows, dtype=torch.float32) for _ in range(2))
    add_place, norm_place = _places(add_subset, add_counts, x), _places(norm_subset, norm_counts, x)
    constants = _forward_constants(
        dim, y_bias is not None, add_subset is not None, norm_subset is not None, weight is not None, not inplace
    )
    for at in _launches(groups, add_counts_or_all, norm_counts_or_all):
        if rows := at.add.tokens:
            add_norm_fwd_kernel[(triton.cdiv(rows, constants["BLOCK_R"]),)](
                x[at.add.stream :], y[at.add.row :], x if y_bias is None else y_bias,
                x if weight is None else weight, x if bias is None else bias,
                add_place[at.first :] if add_subset is not None else x,
                norm_place[at.first :] if norm_subset is not None else x,
                out[at.add.stream :], normed[at.norm.row :], mean[at.norm.row :], rstd[at.norm.row :],
                rows, *at.sizes, eps, **constants, num_warps=_warps(constants["BLOCK_D"], FORWARD_WARPS),
            )  # fmt: skip
    return out, normed, mean, rstd


def _forward_constants(
    dim: int, has_bias: bool, add_subset: bool, norm_subset: bool, has_norm: bool, has_stats: bool
) -> dict[str, int | bool]:
    flags = {"HAS_BIAS": has_bias, "ADD_SUBSET": add_subset, "NORM_SUBSET": norm_subset}
    block = triton.next_power_of_2(dim)
    return {"D": dim, "BLOCK_R": FORWARD_ROWS, "BLOCK_D": block, **flags, "HAS_NORM": has_norm, "HAS_STATS": has_stats}


@on_their_device
def add_norm_backward(
    grad: Tensor | None,  # (T, D)
    grad_normed: Tensor | None,  # (Rn, D)
    x: Tensor,  # (T, D), the sum
    weight: Tensor | None,  # (D,)
    mean: Tensor | None,  # (Rn,) float32
    rstd: Tensor | None,  # (Rn,) float32
    subsets: Subsets,
    has_add: bool,
    has_bias: bool,
) -> list[Tensor]:
    """Gradients: of x (T, D), of y (Ra, D; empty without a subset: it is that of x), sums (3, D) float32."""
    groups, add_subset, add_counts, norm_subset, norm_counts = subsets
    grad = None if grad is None else grad.contiguous()
    grad_normed = None if grad_normed is None else grad_normed.contiguous()
    x, dim = x.contiguous(), x.shape[1]
    add_counts_or_all = None if add_subset is None or not has_add else add_counts
    norm_counts_or_all = None if norm_subset is None else norm_counts
    grad_x = torch.empty_like(x)
    branch_rows = num_tokens(kept_groups(groups, add_counts_or_all)) if has_add and add_subset is not None else 0
    grad_y = x.new_empty(branch_rows, dim)
    has_norm = grad_normed is not None
    constants = _backward_constants(
        dim, grad is not None, has_add, has_bias, add_subset is not None and has_add, norm_subset is not None, has_norm
    )
    launches = [at for at in _launches(groups, add_counts_or_all, norm_counts_or_all) if at.add.tokens]
    counts = [min(triton.cdiv(at.add.tokens, constants["BLOCK_R"]), _programs(x.device)) for at in launches]
    sums = torch.empty(3, sum(counts), dim, dtype=torch.float32, device=x.device)
    add_place, norm_place = _places(add_subset, add_counts, x), _places(norm_subset, norm_counts, x)
    warps, done = _warps(constants["BLOCK_D"], BACKWARD_WARPS), 0
    for at, count in zip(launches, counts, strict=True):
        add_norm_bwd_kernel[(count,)](
            x if grad is None else grad[at.add.stream :],
            x if grad_normed is None else grad_normed[at.norm.row :], x[at.add.stream :],
            x if weight is None else weight,
            x if mean is None else mean[at.norm.row :], x if rstd is None else rstd[at.norm.row :],
            add_place[at.first :] if add_subset is not None else x,
            norm_place[at.first :] if norm_subset is not None else x,
            grad_x[at.add.stream :], grad_y[at.add.row :] if constants["ADD_SUBSET"] else grad_y, sums[0, done:],
            at.add.tokens, *at.sizes, count, sums.stride(0), **constants, num_warps=warps,
        )  # fmt: skip
        done += count
    # Sums that no kernel wrote are zero: a branch without a bias has no third, a sum without a norm no first two.
    wanted = (0 if has_norm else 2, 3 if has_bias else 2)
    if wanted == (0, 3):
        return [grad_x, grad_y, add_up(sums)]
    totals = torch.zeros(3, dim, dtype=torch.float32, device=x.device)
    if wanted[0] < wanted[1]:
        add_up(sums[wanted[0] : wanted[1]], totals[wanted[0] : wanted[1]])
    return [grad_x, grad_y, totals]


def _backward_constants(
    dim: int, has_grad: bool, has_add: bool, has_bias: bool, add_subset: bool, norm_subset: bool, has_norm: bool
) -> dict[str, int | bool]:
    block = triton.next_power_of_2(dim)
    shape = {"D": dim, "BLOCK_R": BACKWARD_ROWS, "BLOCK_D": block}
    flags = {"HAS_GRAD": has_grad, "HAS_ADD": has_add, "HAS_BIAS": has_bias, "ADD_SUBSET": add_subset}
    return {**shape, **flags, "NORM_SUBSET": norm_subset, "HAS_NORM": has_norm, "STAGES": STAGES}


def _warps(block: int, warps: int) -> int:
    """Warps of a program: more for rows that would not fit one warp's registers."""
    return min(max(warps, block // 1024), 16)


def _programs(device: torch.device) -> int:
    """Programs of the backward pass: some per multiprocessor, few enough that the partial sums stay small."""
    if device.type != "cuda":
        return 4
    return BACKWARD_PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


def _variants() -> list[Variant]:
    result = []
    for recipe, dim in (("vit_s16", 384), ("vit_b16", 768), ("vit_g16", 1024)):
        names = add_norm_fwd_kernel.arg_names + add_norm_bwd_kernel.arg_names
        signature = dict.fromkeys((name for name in names if name.endswith("_ptr")), "*bf16")
        for name in ("weight", "bias", "y_bias", "mean", "rstd", "sums"):
            signature[f"{name}_ptr"] = "*fp32"
        for name in ("add_place", "norm_place"):
            signature[f"{name}_ptr"] = "*i32"
        integers = ("rows", "n0", "len0", "len1", "add_kept0", "norm_kept0", "programs", "sums_stride")
        signature |= dict.fromkeys(integers, "i32") | dict.fromkeys(("scale0", "scale1", "eps"), "fp32")
        for subsets in (True, False):
            name = f"{recipe} {'student' if subsets else 'teacher'} bf16"
            constants = _forward_constants(dim, True, subsets, subsets, True, subsets)
            warps = _warps(constants["BLOCK_D"], FORWARD_WARPS)
            result.append(Variant(name, add_norm_fwd_kernel, signature, constants, warps))
        constants = _backward_constants(dim, True, True, True, True, True, True)
        warps = _warps(constants["BLOCK_D"], BACKWARD_WARPS)
        result.append(Variant(f"{recipe} bf16", add_norm_bwd_kernel, signature, constants, warps))
    return result


VARIANTS = _variants()
