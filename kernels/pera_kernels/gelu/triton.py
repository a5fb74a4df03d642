"""Triton kernels of gelu: each value is read once and written once; column sums are taken on the way.

The libraries' erf costs more time than the memory traffic around it. Half types take Abramowitz and Stegun's formula
7.1.26, whose error in erf is at most 1.5e-7: far below their rounding. float32 takes the library's erf.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import Variant
from ..launching import on_their_device
from ..packed_triton import why_not
from ..partial_sums.triton import add_up

BLOCK, FORWARD_WARPS = 8192, 8  # values of a forward program: 32 a thread
BLOCK_R, BLOCK_C = 16, 256  # backward tile: 32 values a thread
NUM_WARPS = 4
PROGRAMS = 4  # of the backward pass, per multiprocessor
STAGES = 1  # loads ahead of their use cost more than they bring: the tile has enough of them in flight

__all__ = ["VARIANTS", "gelu", "gelu_backward_", "why_not"]


@triton.jit
def normal_cdf(x, EXACT: tl.constexpr):
    """The standard normal distribution's Phi(x), and exp(-x * x / 2); float32."""
    density = tl.exp2(x * x * -0.7213475204444817)  # log2(e) / 2
    if EXACT:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        t = 1.0 / (1.0 + 0.23164189 * tl.abs(x))  # 0.3275911 / sqrt(2)
        p = 0.5307027145 * t - 0.7265760135  # halves of the coefficients: Phi has half an erfc
        p = p * t + 0.7107068705
        p = p * t - 0.142248368
        p = p * t + 0.127414796
        tail = p * t * density
        cdf = tl.where(x >= 0.0, 1.0 - tail, tail)
    return cdf, density


@triton.jit
def gelu_fwd_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    x = tl.load(x_ptr + i, mask=mask, other=0.0).to(tl.float32)
    out = x * normal_cdf(x, EXACT)[0]
    tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gelu_bwd_kernel(
    grad_ptr,  # (R, C), overwritten by the gradient of x
    x_ptr,  # (R, C)
    out_ptr,  # (R, C), gelu(x)
    sums_ptr,  # (programs, C) float32, column sums of the gradient of x
    rows,
    programs,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_OUT: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(1)
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in tl.range(program * BLOCK_R, rows, programs * BLOCK_R, num_stages=STAGES):
        row = first + tl.arange(0, BLOCK_R)
        place = row.to(tl.int64)[:, None] * C + col[None, :]
        mask = (row < rows)[:, None] & (col < C)[None, :]
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
        cdf, density = normal_cdf(x, EXACT)
        if HAS_OUT:
            tl.store(out_ptr + place, (x * cdf).to(out_ptr.dtype.element_ty), mask=mask)
        grad *= cdf + x * density * 0.3989422804014327  # 1 / sqrt(2 pi)
        tl.store(grad_ptr + place, grad.to(grad_ptr.dtype.element_ty), mask=mask)
        sums += grad
    tl.store(sums_ptr + program.to(tl.int64) * C + col, tl.sum(sums, 0), mask=col < C)


@on_their_device
def gelu(x: Tensor, out: Tensor) -> Tensor:
    """Fills out, which may be x; both contiguous. Returns it."""
    if x.numel():
        grid = (triton.cdiv(x.numel(), BLOCK),)
        gelu_fwd_kernel[grid](x, out, x.numel(), BLOCK=BLOCK, EXACT=x.dtype == torch.float32, num_warps=FORWARD_WARPS)
    return out


@on_their_device
def gelu_backward_(
    grad: Tensor,  # (R, C), overwritten
    x: Tensor,  # (R, C)
    with_out: bool,
) -> tuple[Tensor, Tensor]:
    """gelu(x) (R, C), or no rows without ``with_out``; column sums (C,) float32 of the gradient of x."""
    rows, width = x.shape
    out = torch.empty_like(x) if with_out else x.new_empty(0, width)
    blocks = triton.cdiv(width, BLOCK_C)
    count = max(min(triton.cdiv(rows, BLOCK_R), _programs(x.device) // blocks), 1)
    sums = torch.empty(count, width, dtype=torch.float32, device=x.device)
    gelu_bwd_kernel[(blocks, count)](
        grad, x, out, sums, rows, count, **_constants(width, with_out, x.dtype == torch.float32), num_warps=NUM_WARPS
    )
    return out, add_up(sums)


def _constants(width: int, with_out: bool, exact: bool) -> dict[str, int | bool]:
    shape = {"C": width, "BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C}
    return {**shape, "HAS_OUT": with_out, "EXACT": exact, "STAGES": STAGES}


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


def _variants() -> list[Variant]:
    pointers = {"grad_ptr": "*bf16", "x_ptr": "*bf16", "out_ptr": "*bf16", "sums_ptr": "*fp32"}
    signature = {**pointers, "rows": "i32", "programs": "i32"}
    constants = {"BLOCK": BLOCK, "EXACT": False}
    result = [Variant("bf16", gelu_fwd_kernel, {**pointers, "size": "i32"}, constants, FORWARD_WARPS)]
    for recipe, width in (("vit_s16", 1536), ("vit_b16", 3072), ("vit_g16", 4096)):
        for with_out in (True, False):
            name = f"{recipe} bf16{', gelu again' if with_out else ''}"
            result.append(Variant(name, gelu_bwd_kernel, signature, _constants(width, with_out, False), NUM_WARPS))
    return result


VARIANTS = _variants()
