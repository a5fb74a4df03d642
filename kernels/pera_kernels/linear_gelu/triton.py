"""Triton kernels of linear_gelu: a matrix product whose epilogue adds the bias and takes the GELU, and its gradient.

Tiles are loaded and stored by the tensor memory accelerator (TMA). Two programs share a multiprocessor, so that one's
epilogue, which is arithmetic only, runs beside the other's products. The GELU is that of ``pera_kernels.gelu``.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..aot import Variant
from ..gelu.triton import normal_cdf
from ..launching import on_their_device
from ..partial_sums.triton import add_up

__all__ = ["VARIANTS", "Tile", "linear_gelu", "linear_gelu_backward", "why_not"]

ALIGNMENT = 16  # bytes: of the rows and of the first value, for the TMA
PRODUCT_ROWS = 1024  # rows, at least: fewer do not fill a card with tiles


class Tile(NamedTuple):
    """Tile sizes of the product.

    Attributes:
        rows, columns, depth: of one tile, and of one step of its inner loop.
        group: tiles of rows that are next to each other in time, so that the weight's tiles stay in the L2 cache.
        parts: parts in which the epilogue takes the columns.
        warps, stages: of a program.
    """

    rows: int
    columns: int
    depth: int
    group: int
    parts: int
    warps: int
    stages: int


# The fastest on an H200 of those in bench/results/gpu/linear_gelu.
TILE = Tile(128, 128, 64, 8, 2, 4, 3)
BACKWARD_TILE = Tile(128, 128, 64, 8, 2, 4, 3)


@triton.jit
def tile_place(program, M, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a program's tile: GROUP tiles of rows go through the columns together."""
    across = tl.cdiv(N, BLOCK_N)
    down = tl.cdiv(M, BLOCK_M)
    first = program // (GROUP * across) * GROUP
    size = tl.minimum(down - first, GROUP)
    row = (first + program % (GROUP * across) % size) * BLOCK_M
    return row, program % (GROUP * across) // size * BLOCK_N


@triton.jit
def finish(
    acc, bias_ptr, hidden_desc, out_desc, row, column, N: tl.constexpr, WIDTH: tl.constexpr, HAS_HIDDEN: tl.constexpr
):
    """Bias, GELU and stores of WIDTH columns."""
    col = column + tl.arange(0, WIDTH)
    bias = tl.load(bias_ptr + col, mask=col < N, other=0.0).to(tl.float32)
    x = acc + bias[None, :]
    if HAS_HIDDEN:
        hidden = x.to(hidden_desc.dtype)
        hidden_desc.store([row, column], hidden)
        x = hidden.to(tl.float32)  # as it is stored: the backward pass starts from that
    out_desc.store([row, column], (x * normal_cdf(x, False)[0]).to(out_desc.dtype))


@triton.jit
def linear_gelu_kernel(
    x_desc,  # (M, K), tiles (BLOCK_M, BLOCK_K)
    weight_desc,  # (N, K), tiles (BLOCK_N, BLOCK_K)
    bias_ptr,  # (N,)
    hidden_desc,  # as out_desc
    out_desc,  # (M, N), tiles (BLOCK_M, BLOCK_N / PARTS)
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
):
    row, column = tile_place(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(x_desc.load([row, k]), weight_desc.load([column, k]).T, acc)
    if PARTS == 1:
        finish(acc, bias_ptr, hidden_desc, out_desc, row, column, N, BLOCK_N, HAS_HIDDEN)
    else:
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        half: tl.constexpr = BLOCK_N // 2
        finish(left, bias_ptr, hidden_desc, out_desc, row, column, N, half, HAS_HIDDEN)
        finish(right, bias_ptr, hidden_desc, out_desc, row, column + half, N, half, HAS_HIDDEN)


@triton.jit
def finish_backward(
    acc, hidden_desc, grad_desc, sums_ptr, row, column, N: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Slope of the GELU, store and column sums of WIDTH columns."""
    h = hidden_desc.load([row, column]).to(tl.float32)
    cdf, density = normal_cdf(h, False)
    grad = acc * (cdf + h * density * 0.3989422804014327)  # 1 / sqrt(2 pi)
    grad_desc.store([row, column], grad.to(grad_desc.dtype))
    col = column + tl.arange(0, WIDTH)
    tl.store(sums_ptr + col, tl.sum(grad, 0), mask=col < N)  # rows beyond the last are zeros


@triton.jit
def linear_gelu_bwd_kernel(
    y_desc,  # (M, K), gradient of the next layer's result, tiles (BLOCK_M, BLOCK_K)
    weight_desc,  # (K, N), of the next layer, tiles (BLOCK_K, BLOCK_N)
    hidden_desc,  # (M, N), tiles (BLOCK_M, BLOCK_N / PARTS)
    grad_desc,  # (M, N), gradient of hidden, as hidden_desc
    sums_ptr,  # (tiles of rows, N) float32
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):
    row, column = tile_place(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(y_desc.load([row, k]), weight_desc.load([k, column]), acc)
    sums_ptr += (row // BLOCK_M).to(tl.int64) * N
    if PARTS == 1:
        finish_backward(acc, hidden_desc, grad_desc, sums_ptr, row, column, N, BLOCK_N)
    else:
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        half: tl.constexpr = BLOCK_N // 2
        finish_backward(left, hidden_desc, grad_desc, sums_ptr, row, column, N, half)
        finish_backward(right, hidden_desc, grad_desc, sums_ptr, row, column + half, N, half)


def why_not(x: Tensor, width: int) -> str | None:
    """Why the kernel cannot take x [M, K] and a weight of that many rows, or None."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"{x.dtype} runs as a product and a GELU"
    if x.shape[0] < PRODUCT_ROWS and x.is_cuda:
        return f"{x.shape[0]} rows are too few"
    if (x.shape[1] * x.itemsize) % ALIGNMENT or (width * x.itemsize) % ALIGNMENT or x.data_ptr() % ALIGNMENT:
        return f"rows must be multiples of {ALIGNMENT} bytes"
    return None


def _tiles(t: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), [t.shape[1], 1], list(block))


@on_their_device
def linear_gelu(
    x: Tensor,  # (M, K)
    weight: Tensor,  # (N, K)
    bias: Tensor,  # (N,)
    with_hidden: bool,
    tile: Tile = TILE,
) -> tuple[Tensor, Tensor]:
    """``gelu(h)`` (M, N) and, with_hidden, ``h = x W' + b`` (M, N; else no rows); all contiguous, one half type."""
    (rows, depth), width = x.shape, weight.shape[0]
    out = x.new_empty(rows, width)
    hidden = x.new_empty(rows if with_hidden else 0, width)
    if not out.numel():
        return out, hidden

    block = tile.rows, tile.columns // tile.parts
    result = _tiles(out, *block)
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(width, tile.columns),)
    linear_gelu_kernel[grid](
        _tiles(x, tile.rows, tile.depth), _tiles(weight, tile.columns, tile.depth), bias,
        _tiles(hidden, *block) if with_hidden else result, result, rows,
        **_constants(width, depth, tile), HAS_HIDDEN=with_hidden, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, hidden


@on_their_device
def linear_gelu_backward(
    y: Tensor,  # (M, K), gradient of the next layer's result
    weight: Tensor,  # (K, N), of the next layer
    hidden: Tensor,  # (M, N)
    tile: Tile = BACKWARD_TILE,
) -> tuple[Tensor, Tensor]:
    """Gradient of hidden (M, N) and its column sums (N,) float32."""
    (rows, depth), width = y.shape, weight.shape[1]
    grad = torch.empty_like(hidden)
    down = triton.cdiv(rows, tile.rows)
    sums = torch.empty(down, width, dtype=torch.float32, device=y.device)
    block = tile.rows, tile.columns // tile.parts
    grid = (down * triton.cdiv(width, tile.columns),)
    linear_gelu_bwd_kernel[grid](
        _tiles(y, tile.rows, tile.depth), _tiles(weight, tile.depth, tile.columns), _tiles(hidden, *block),
        _tiles(grad, *block), sums, rows,
        **_constants(width, depth, tile), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return grad, add_up(sums)


def _constants(width: int, depth: int, tile: Tile) -> dict[str, Any]:
    blocks = {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth}
    return {"N": width, "K": depth, **blocks, "GROUP": tile.group, "PARTS": tile.parts}


def _variants() -> list[Variant]:
    result = []
    for recipe, depth in (("vit_s16", 384), ("vit_b16", 768), ("vit_g16", 1024)):
        block = TILE.rows, TILE.columns // TILE.parts
        tensors = {"x": (TILE.rows, TILE.depth), "weight": (TILE.columns, TILE.depth), "hidden": block, "out": block}
        signature = {f"{name}_desc": f"tensordesc<bf16[{r},{c}]>" for name, (r, c) in tensors.items()}
        signature |= {"bias_ptr": "*bf16", "M": "i32"}
        for with_hidden in (False, True):
            constants = {**_constants(4 * depth, depth, TILE), "HAS_HIDDEN": with_hidden}
            name = f"{recipe} {'student' if with_hidden else 'teacher'} bf16"
            result.append(Variant(name, linear_gelu_kernel, signature, constants, TILE.warps, TILE.stages, least=90))
        result.append(_backward_variant(f"{recipe} bf16", depth))
    return result


def _backward_variant(name: str, depth: int) -> Variant:
    tile = BACKWARD_TILE
    block = tile.rows, tile.columns // tile.parts
    tensors = {"y": (tile.rows, tile.depth), "weight": (tile.depth, tile.columns)}
    tensors |= dict.fromkeys(("hidden", "grad"), block)
    signature = {f"{name}_desc": f"tensordesc<bf16[{r},{c}]>" for name, (r, c) in tensors.items()}
    signature |= {"sums_ptr": "*fp32", "M": "i32"}
    constants = _constants(4 * depth, depth, tile)
    return Variant(name, linear_gelu_bwd_kernel, signature, constants, tile.warps, tile.stages, least=90)


VARIANTS = _variants()
