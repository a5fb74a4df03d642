"""Triton kernel of gelu_fp8: a program takes a row, which stays in registers until its largest magnitude is known.

The kernel computes as much as it moves, so no lane may idle: a row is a large power of two and a second, smaller one,
which is exact for the widths of the recipes (3072 = 2048 + 1024).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import fp8
from ..aot import Variant
from ..fp8_triton import VALUES, row_scale, why_not
from ..gelu.triton import normal_cdf
from ..launching import on_their_device

__all__ = ["VARIANTS", "gelu_fp8", "why_not"]


@triton.jit
def gelu_part(x_ptr, first, start, C: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    """GELU of BLOCK values of a row from ``start`` on, 0 beyond the row; their places and which of them exist."""
    col = start + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + first + col, mask=col < C, other=0.0).to(tl.float32)
    return x * normal_cdf(x, EXACT)[0], first + col, col < C


@triton.jit
def gelu_fp8_kernel(
    x_ptr,  # (R, C)
    values_ptr,  # (R, C) e4m3
    scale_ptr,  # (R,) float32
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    EXACT: tl.constexpr,
):
    row = tl.program_id(0)
    first = row.to(tl.int64) * C
    out, place, mask = gelu_part(x_ptr, first, 0, C, BLOCK, EXACT)
    largest = tl.max(tl.abs(out), 0)
    if REST > 0:
        rest, rest_place, rest_mask = gelu_part(x_ptr, first, BLOCK, C, REST, EXACT)
        largest = tl.maximum(largest, tl.max(tl.abs(rest), 0))
    scale, factor = row_scale(largest)
    tl.store(values_ptr + place, (out * factor).to(values_ptr.dtype.element_ty), mask=mask)
    if REST > 0:
        tl.store(values_ptr + rest_place, (rest * factor).to(values_ptr.dtype.element_ty), mask=rest_mask)
    tl.store(scale_ptr + row, scale)


@on_their_device
def gelu_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values (R, C) in e4m3 and scales (R, 1) of gelu(x), x (R, C)."""
    x = x.contiguous()
    rows, columns = x.shape
    values = torch.empty(rows, columns, dtype=fp8.kernel_dtype(), device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    constants = _constants(columns, x.dtype == torch.float32)
    if rows:
        gelu_fp8_kernel[(rows,)](x, values, scale, **constants, num_warps=_warps(columns))
    return values.to(fp8.E4M3), scale  # of what is e4m3 already, `to` is the same tensor


def _constants(columns: int, exact: bool) -> dict[str, int | bool]:
    block = 1 << (columns.bit_length() - 1)
    rest = columns - block
    return {"C": columns, "BLOCK": block, "REST": triton.next_power_of_2(rest) if rest else 0, "EXACT": exact}


def _warps(columns: int) -> int:
    return min(triton.next_power_of_2(triton.cdiv(columns, VALUES)), 16)


def _variants() -> list[Variant]:
    result = []
    signature = {"x_ptr": "*bf16", "values_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
    for recipe, columns in (("vit_s16", 1536), ("vit_b16", 3072), ("vit_g16", 4096)):
        constants = _constants(columns, False)
        result.append(Variant(f"{recipe} bf16", gelu_fp8_kernel, signature, constants, _warps(columns), least=89))
    return result


VARIANTS = _variants()
