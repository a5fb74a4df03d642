"""Triton kernel of add_norm_fp8: the stream is read and written once, the normalised rows are written as bytes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import fp8
from ..aot import Variant
from ..fp8_triton import row_scale
from ..launching import on_their_device

MAX_DIM = 8192  # a row has to fit one block's registers
VALUES = 1024  # of a row, for each warp: one warp exchanges nothing with others

__all__ = ["VARIANTS", "add_norm_fp8_", "why_not"]


@triton.jit
def add_norm_fp8_kernel(
    x_ptr,  # (T, D) stream, overwritten by the sum
    y_ptr,  # (T, D) branch
    y_bias_ptr,  # (D,)
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    values_ptr,  # (T, D) e4m3
    scale_ptr,  # (T,) float32
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_ADD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    row = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    mask = col < D
    place = row.to(tl.int64) * D + col
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if HAS_ADD:
        x += tl.load(y_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(y_bias_ptr + col, mask=mask, other=0.0).to(tl.float32)
        x = x.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + place, x, mask=mask)
        x = x.to(tl.float32)  # as it is stored: the next branch adds to that
    mean = tl.sum(x, 0) / D
    centered = tl.where(mask, x - mean, 0.0)  # two passes over registers: no cancellation
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centered * centered, 0) / D + eps)
    weight = tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + col, mask=mask, other=0.0).to(tl.float32)
    normed = centered * rstd * weight + bias  # 0 beyond the row
    scale, factor = row_scale(tl.max(tl.abs(normed), 0))
    tl.store(values_ptr + place, (normed * factor).to(values_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + row, scale)


def why_not(x: Tensor) -> str | None:
    """Why this kernel cannot take a stream, or None."""
    return None if x.shape[1] <= MAX_DIM else f"a row of {x.shape[1]} values does not fit one block (at most {MAX_DIM})"


@on_their_device
def add_norm_fp8_(
    x: Tensor,  # (T, D), contiguous; overwritten by the sum
    y: Tensor | None,  # (T, D)
    y_bias: Tensor | None,  # (D,)
    weight: Tensor,  # (D,)
    bias: Tensor,  # (D,)
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Values (T, D) in e4m3 and scales (T, 1) of the normalised sum."""
    rows, dim = x.shape
    y = x if y is None else y.contiguous()
    values = torch.empty(rows, dim, dtype=fp8.kernel_dtype(), device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    constants = _constants(dim, y is not x, y_bias is not None)
    if rows:
        add_norm_fp8_kernel[(rows,)](
            x, y, x if y_bias is None else y_bias.contiguous(), weight.contiguous(), bias.contiguous(), values, scale,
            eps, **constants, num_warps=_warps(constants["BLOCK"]),
        )  # fmt: skip
    return values.to(fp8.E4M3), scale  # of what is e4m3 already, `to` is the same tensor


def _constants(dim: int, has_add: bool, has_bias: bool) -> dict[str, int | bool]:
    return {"D": dim, "BLOCK": triton.next_power_of_2(dim), "HAS_ADD": has_add, "HAS_BIAS": has_bias}


def _warps(block: int) -> int:
    return min(max(block // VALUES, 1), 16)


def _variants() -> list[Variant]:
    result = []
    signature = dict.fromkeys(("x_ptr", "y_ptr"), "*bf16") | {"values_ptr": "*fp8e4nv", "eps": "fp32"}
    signature |= {f"{name}_ptr": "*fp32" for name in ("y_bias", "weight", "bias", "scale")}
    for recipe, dim in (("vit_s16", 384), ("vit_b16", 768), ("vit_g16", 1024)):
        for has_add in (True, False):
            constants = _constants(dim, has_add, has_add)
            name = f"{recipe} bf16{'' if has_add else ', norm alone'}"
            warps = _warps(constants["BLOCK"])
            result.append(Variant(name, add_norm_fp8_kernel, signature, constants, warps, least=89))
    return result


VARIANTS = _variants()
