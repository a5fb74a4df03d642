"""Triton kernels of unit_rows: a row stays in registers while its length is computed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import Variant
from ..launching import on_their_device

MAX_DIM = 8192  # a row has to fit one block's registers
VALUES = 2048  # of a program
NUM_WARPS = 4

__all__ = ["VARIANTS", "unit_rows", "unit_rows_backward", "why_not"]


@triton.jit
def unit_rows_fwd_kernel(x_ptr, out_ptr, rows, eps, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < rows)[:, None] & (col < D)
    place = row.to(tl.int64)[:, None] * D + col
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt_rn(tl.sum(x * x, 1)), eps)
    tl.store(out_ptr + place, (x / length[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def unit_rows_bwd_kernel(
    grad_ptr,  # (R, D), gradient of the unit rows
    x_ptr,  # (R, D)
    grad_x_ptr,  # (R, D)
    rows,
    eps,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < rows)[:, None] & (col < D)
    place = row.to(tl.int64)[:, None] * D + col
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
    length = tl.sqrt_rn(tl.sum(x * x, 1))
    inverse = 1.0 / tl.maximum(length, eps)
    unit = x * inverse[:, None]
    # What lies along the row changes its length only, which the result does not show; below eps the length is fixed.
    along = tl.where(length >= eps, tl.sum(grad * unit, 1), 0.0)
    grad_x = (grad - unit * along[:, None]) * inverse[:, None]
    tl.store(grad_x_ptr + place, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


def why_not(x: Tensor) -> str | None:
    """Why these kernels cannot take a matrix, or None."""
    return None if x.shape[1] <= MAX_DIM else f"a row of {x.shape[1]} values does not fit one block (at most {MAX_DIM})"


def _constants(dim: int) -> dict[str, int]:
    block = triton.next_power_of_2(dim)
    return {"D": dim, "BLOCK_R": max(VALUES // block, 1), "BLOCK_D": block}


@on_their_device
def unit_rows(x: Tensor, eps: float) -> Tensor:
    """Unit rows (R, D) of contiguous x (R, D)."""
    out, constants = torch.empty_like(x), _constants(x.shape[1])
    grid = (triton.cdiv(x.shape[0], constants["BLOCK_R"]),)
    unit_rows_fwd_kernel[grid](x, out, x.shape[0], eps, **constants, num_warps=NUM_WARPS)
    return out


@on_their_device
def unit_rows_backward(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    """Gradient of x (R, D) from that of the unit rows (R, D); both contiguous."""
    out, constants = torch.empty_like(x), _constants(x.shape[1])
    grid = (triton.cdiv(x.shape[0], constants["BLOCK_R"]),)
    unit_rows_bwd_kernel[grid](grad, x, out, x.shape[0], eps, **constants, num_warps=NUM_WARPS)
    return out


def _variants() -> list[Variant]:
    signature = {"grad_ptr": "*bf16", "x_ptr": "*bf16", "out_ptr": "*bf16", "grad_x_ptr": "*bf16"}
    signature |= {"rows": "i32", "eps": "fp32"}
    constants = _constants(256)
    return [
        Variant("bottleneck of 256, bf16", kernel, signature, constants, NUM_WARPS)
        for kernel in (unit_rows_fwd_kernel, unit_rows_bwd_kernel)
    ]


VARIANTS = _variants()
