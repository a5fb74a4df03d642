"""Triton kernels of contrast_mean and visible_patches.

contrast_mean: a program sums the gray of one tile of a crop, a second kernel adds a crop's tiles in a fixed order;
programs of crops without contrast end before they read a pixel. visible_patches: a program reads some patches of one
crop and writes their rows, each byte once. No atomics, equal bits on every repeat.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import Variant
from ..launching import on_their_device
from .arguments import Patches
from .pixels import (
    BYTES,
    PACKED,
    SHORTS,
    TILE_PIXELS,
    VIEWS,
    band_patches,
    blend_step,
    color_step,
    is_packed,
    load_channel,
    load_packed,
    luma,
    patch_address,
    rgb_patches,
)
from .reference import color_channels, is_raw

MAX_PATCH = 128  # a patch has to fit one program's registers
MEAN_PIXELS = 2048  # of one program of contrast_mean: 8 for each of 256 threads


@triton.jit
def contrast_place(order_ptr, crop):
    """Position of contrast in the crop's colour order: 0 to 3, or 4 if it is not there."""
    place = tl.where(tl.load(order_ptr + crop * 4 + 3) == 1, 3, 4)
    place = tl.where(tl.load(order_ptr + crop * 4 + 2) == 1, 2, place)
    place = tl.where(tl.load(order_ptr + crop * 4 + 1) == 1, 1, place)
    return tl.where(tl.load(order_ptr + crop * 4) == 1, 0, place)


@triton.jit
def contrast_mean_fwd_kernel(
    crops_ptr,  # (N, H, W, C) uint8 or uint16, as int64 words if PACKED
    order_ptr,  # (N, 4)
    factors_ptr,  # (N, 4) float32
    partial_ptr,  # (N, tiles) float32, written where the crop has contrast
    pixels,  # H * W
    width,
    tiles,
    stride_n,
    stride_y,
    stride_x,
    stride_c,
    C: tl.constexpr,
    KIND: tl.constexpr,
    RED: tl.constexpr,  # -1 if there are no colours
    GREEN: tl.constexpr,
    BLUE: tl.constexpr,
    PIXELS: tl.constexpr,
):
    program = tl.program_id(0)
    crop = (program // tiles).to(tl.int64)
    tile = (program % tiles).to(tl.int64)
    place = contrast_place(order_ptr, crop)
    if place < 4:
        f0 = tl.load(factors_ptr + crop * 4)
        f2 = tl.load(factors_ptr + crop * 4 + 2)
        f3 = tl.load(factors_ptr + crop * 4 + 3)
        code0 = tl.where(place > 0, tl.load(order_ptr + crop * 4), -1)
        code1 = tl.where(place > 1, tl.load(order_ptr + crop * 4 + 1), -1)
        code2 = tl.where(place > 2, tl.load(order_ptr + crop * 4 + 2), -1)
        pixel = tile * PIXELS + tl.arange(0, PIXELS)
        mask = pixel < pixels
        address = crop * stride_n + (pixel // width) * stride_y + (pixel % width) * stride_x
        gray = tl.zeros((PIXELS,), tl.float32)
        if RED >= 0:
            if KIND == PACKED:
                group = tile * (PIXELS // 8) + tl.arange(0, PIXELS // 8)
                r, g, b = load_packed(crops_ptr, crop * stride_n + group * 3, group * 8 < pixels)
            else:
                r = load_channel(crops_ptr, address + RED * stride_c, mask, KIND)
                g = load_channel(crops_ptr, address + GREEN * stride_c, mask, KIND)
                b = load_channel(crops_ptr, address + BLUE * stride_c, mask, KIND)
            r, g, b = color_step(r, g, b, code0, f0, 1.0, f2, f3, 0.0)
            r, g, b = color_step(r, g, b, code1, f0, 1.0, f2, f3, 0.0)
            r, g, b = color_step(r, g, b, code2, f0, 1.0, f2, f3, 0.0)
            gray = luma(r, g, b) if C == 3 else r + g + b
        if C != 3 or RED < 0:
            for c in range(C):
                if (c != RED) & (c != GREEN) & (c != BLUE):
                    x = load_channel(crops_ptr, address + c * stride_c, mask, KIND)
                    x = blend_step(x, code0, f0, 1.0, 0.0)
                    x = blend_step(x, code1, f0, 1.0, 0.0)
                    x = blend_step(x, code2, f0, 1.0, 0.0)
                    gray += x
            gray = gray / C
        tl.store(partial_ptr + program, tl.sum(tl.where(mask, gray, 0.0), 0))


@triton.jit
def contrast_mean_sum_fwd_kernel(
    order_ptr,  # (N, 4)
    partial_ptr,  # (N, tiles) float32
    means_ptr,  # (N,) float32
    tiles,
    pixels,
    BLOCK: tl.constexpr,
):
    crop = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    if contrast_place(order_ptr, crop) < 4:
        for start in range(0, tiles, BLOCK):
            tile = start + tl.arange(0, BLOCK)
            total += tl.load(partial_ptr + crop * tiles + tile, mask=tile < tiles, other=0.0)
    tl.store(means_ptr + crop, tl.sum(total, 0) / pixels)


@triton.jit
def visible_patches_fwd_kernel(
    crops_ptr,  # (N, H, W, C) uint8 or uint16, as int64 words if PACKED; or float (N, C, H, W)
    index_ptr,  # (N, n)
    order_ptr,  # (N, 4), read if COLOR
    factors_ptr,  # (N, 4) float32, read if COLOR
    gray_ptr,  # (N,) float32, read if COLOR
    rows_ptr,  # (N * n, C * P * P)
    per_crop,  # n
    tiles,  # programs per crop
    columns,  # patches per line of patches
    stride_n,
    stride_y,
    stride_x,
    stride_c,
    MEAN: tl.constexpr,
    INVERSE_STD: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
    COLOR: tl.constexpr,
    RED: tl.constexpr,  # -1 if there are no colours
    GREEN: tl.constexpr,
    BLUE: tl.constexpr,
    PATCHES: tl.constexpr,
    PIXELS: tl.constexpr,
):
    program = tl.program_id(0)
    crop = (program // tiles).to(tl.int64)
    number = program % tiles * PATCHES + tl.arange(0, PATCHES)
    seen = number < per_crop
    row = crop * per_crop + number
    patch = tl.load(index_ptr + row, mask=seen, other=0).to(tl.int32)
    pixel = tl.arange(0, PIXELS)
    mask = seen[:, None] & (pixel < P * P)[None, :]
    to = rows_ptr + (row * (C * P * P))[:, None] + pixel[None, :]
    dtype: tl.constexpr = rows_ptr.dtype.element_ty
    if RED >= 0:
        r, g, b = rgb_patches(
            crops_ptr, order_ptr, factors_ptr, gray_ptr, patch, seen, crop, columns, stride_n, stride_y, stride_x,
            stride_c, MEAN, INVERSE_STD, P, PIXELS, KIND, COLOR, RED, GREEN, BLUE,
        )  # fmt: skip
        tl.store(to + RED * P * P, r.to(dtype), mask=mask)
        tl.store(to + GREEN * P * P, g.to(dtype), mask=mask)
        tl.store(to + BLUE * P * P, b.to(dtype), mask=mask)
    if C != 3 or RED < 0:
        address = patch_address(patch, crop, columns, stride_n, stride_y, stride_x, P, PIXELS)
        for c in tl.static_range(C):
            if c != RED and c != GREEN and c != BLUE:
                x = band_patches(
                    crops_ptr, order_ptr, factors_ptr, gray_ptr, address, mask, crop, stride_c, MEAN, INVERSE_STD, c,
                    KIND, COLOR,
                )  # fmt: skip
                tl.store(to + c * P * P, x.to(dtype), mask=mask)


def why_not(crops: Tensor, patch_size: int, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot give rows of this dtype, or None."""
    if torch.float64 in (dtype, crops.dtype):
        return "float64 runs in PyTorch only"
    if patch_size > MAX_PATCH:
        return f"a patch of {patch_size} pixels a side does not fit one block (at most {MAX_PATCH})"
    return None


def source(
    crops: Tensor, patch_size: int, rgb: Sequence[int] | None
) -> tuple[Tensor, tuple[int, int, int, int], dict[str, int]]:
    """Input of the kernels: tensor, strides (N, H, W, C) in elements, and constants KIND, C and those of `colors`."""
    if not is_raw(crops):
        n, c, h, w = crops.stride()
        return crops, (n, h, w, c), {"KIND": VIEWS.value, "C": crops.shape[1], **colors(crops.shape[1], None)}
    constants = {"C": crops.shape[3], **colors(crops.shape[3], rgb)}
    if crops.dtype == torch.uint16:
        return crops, crops.stride(), {"KIND": SHORTS.value, **constants}  # type: ignore[return-value]
    if is_packed(crops, patch_size) and color_channels(3, rgb) == [0, 1, 2]:
        words = crops.view(-1).view(torch.int64)
        return words, (crops.stride(0) // 8, crops.stride(1) // 8, 0, 0), {"KIND": PACKED.value, **constants}
    return crops, crops.stride(), {"KIND": BYTES.value, **constants}  # type: ignore[return-value]


def colors(channels: int, rgb: Sequence[int] | None) -> dict[str, int]:
    """The constants RED, GREEN and BLUE; -1 if there are no colours."""
    return dict(zip(("RED", "GREEN", "BLUE"), color_channels(channels, rgb) or [-1] * 3, strict=True))


def color_args(patches: Patches, other: Tensor) -> list[Tensor]:
    """order, factors and gray_mean as the kernels read them; without colour ``other`` stands in, and is not read."""
    order, factors, gray_mean = patches[2:5]
    if order is None or factors is None or gray_mean is None:
        return [other, other, other]
    return [order.contiguous(), factors.float().contiguous(), gray_mean.float().contiguous()]


def tile_shape(per_crop: int, patch_size: int) -> tuple[int, int, int]:
    """Patches of one program, pixels that stand for each (a power of two), warps."""
    pixels = max(triton.next_power_of_2(patch_size**2), 8)
    patches = min(max(TILE_PIXELS // pixels, 1), triton.next_power_of_2(per_crop))
    return patches, pixels, min(max(patches * pixels // 256, 1), 16)


def normalisation(mean: Sequence[float], std: Sequence[float]) -> dict[str, tuple[float, ...]]:
    """The constants MEAN and INVERSE_STD: a kernel is compiled for each, recipes have one."""
    return {"MEAN": tuple(float(x) for x in mean), "INVERSE_STD": tuple(1.0 / float(x) for x in std)}


@on_their_device
def contrast_mean(
    crops: Tensor,  # (N, H, W, C) uint8 or uint16
    order: Tensor,  # (N, 4)
    factors: Tensor,  # (N, 4)
    rgb: Sequence[int] | None = None,
) -> Tensor:
    """Mean gray (N,) float32 of each crop where contrast comes, 0 where it does not."""
    count, height, width, _ = crops.shape
    means = torch.empty(count, dtype=torch.float32, device=crops.device)
    if count == 0:
        return means
    tiles = triton.cdiv(height * width, MEAN_PIXELS)
    partial = torch.empty(count, tiles, dtype=torch.float32, device=crops.device)
    read, strides, constants = source(crops, 8, rgb)
    order, factors = order.contiguous(), factors.float().contiguous()
    contrast_mean_fwd_kernel[(count * tiles,)](
        read, order, factors, partial, height * width, width, tiles, *strides,
        **constants, PIXELS=MEAN_PIXELS, num_warps=8,
    )  # fmt: skip
    contrast_mean_sum_fwd_kernel[(count,)](order, partial, means, tiles, height * width, BLOCK=128, num_warps=1)
    return means


@on_their_device
def visible_patches(patches: Patches, dtype: torch.dtype) -> Tensor:
    """Rows (N * n, C * P * P) of ``dtype``."""
    crops, index, order, _, _, mean, std, patch_size, rgb = patches
    read, strides, constants = source(crops, patch_size, rgb)
    mean, std = (mean, std) if is_raw(crops) else ([], [])  # not used: one compiled kernel for all
    width = crops.shape[2 if is_raw(crops) else 3]
    rows = torch.empty(index.numel(), constants["C"] * patch_size**2, dtype=dtype, device=crops.device)
    if rows.numel() == 0:
        return rows
    per_program, pixels, warps = tile_shape(index.shape[1], patch_size)
    tiles = triton.cdiv(index.shape[1], per_program)
    visible_patches_fwd_kernel[(index.shape[0] * tiles,)](
        read, index.contiguous(), *color_args(patches, read), rows,
        index.shape[1], tiles, width // patch_size, *strides,
        **normalisation(mean, std), **constants, P=patch_size, COLOR=order is not None,
        PATCHES=per_program, PIXELS=pixels, num_warps=warps,
    )  # fmt: skip
    return rows


def signature(kernel, kind: tl.constexpr, **types: str) -> dict[str, str]:
    """Types of a kernel's runtime arguments for ahead-of-time compilation, int32 where nothing else is said."""
    crops = {PACKED.value: "*i64", BYTES.value: "*u8", SHORTS.value: "*u16", VIEWS.value: "*fp32"}[kind.value]
    known = {"crops_ptr": crops, "index_ptr": "*i32", "order_ptr": "*i32", "factors_ptr": "*fp32", "gray_ptr": "*fp32"}
    return dict.fromkeys(kernel.arg_names, "i32") | known | types


THREE, EIGHT = {"C": 3, **colors(3, None)}, {"C": 8, **colors(8, [4, 2, 1])}
PIXEL_VARIANTS = (
    (PACKED, THREE, True, "packed, colour"),
    (PACKED, THREE, False, "packed"),
    (BYTES, THREE, True, "bytes, colour"),
    (SHORTS, THREE, True, "uint16, colour"),
    (SHORTS, EIGHT, True, "uint16, 8 bands, colour"),
    (VIEWS, THREE, False, "views"),
)


def normalised(bands: dict[str, int]) -> dict[str, tuple[float, ...]]:
    """``normalisation`` of as many channels, for ahead-of-time compilation."""
    return normalisation([0.4] * bands["C"], [0.2] * bands["C"])


def _variants() -> list[Variant]:
    recipes = "vit_s16, vit_b16, vit_g16"  # they differ in the width of their tokens, not in their pixels
    patches, pixels, warps = tile_shape(157, 16)
    constants = {"P": 16, "PATCHES": patches, "PIXELS": pixels}
    result = []
    for kind, bands, name in (
        (PACKED, THREE, "packed"),
        (BYTES, THREE, "bytes"),
        (SHORTS, THREE, "uint16"),
        (SHORTS, EIGHT, "uint16, 8 bands"),
    ):
        types = signature(contrast_mean_fwd_kernel, kind, partial_ptr="*fp32")
        sizes = {**bands, "KIND": kind.value, "PIXELS": MEAN_PIXELS}
        result.append(Variant(f"{recipes} {name}", contrast_mean_fwd_kernel, types, sizes, 8))
    types = signature(contrast_mean_sum_fwd_kernel, PACKED, partial_ptr="*fp32", means_ptr="*fp32")
    result.append(Variant(recipes, contrast_mean_sum_fwd_kernel, types, {"BLOCK": 128}, 1))
    for kind, bands, color, name in PIXEL_VARIANTS:
        types = signature(visible_patches_fwd_kernel, kind, rows_ptr="*bf16")
        chosen = {**constants, **bands, **normalised(bands), "KIND": kind.value, "COLOR": color}
        result.append(Variant(f"{recipes} bf16 {name}", visible_patches_fwd_kernel, types, chosen, warps))
    return result


VARIANTS = _variants()
