"""Triton kernels of pixel_loss: `pred` against the crop's own pixels, which are coloured and normalised in registers.

`pred` has the order of the crop's bytes, (row, column, channel); colours need the three channels of a pixel side by
side. So a program makes three planes, and takes its values out of them in the order of `pred`: reads and writes
of `pred` and its gradient are whole lines. Crops with more than RGB are gone through channel by channel, and lines
come together in the cache. Each program has one sum, a second kernel adds them in a fixed order: no atomics, equal bits
on every repeat. The upstream gradient is read on the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pera_kernels.visible_patches.arguments import Patches
from pera_kernels.visible_patches.pixels import (
    PACKED,
    band_patches,
    interleave_channels,
    patch_address,
    rgb_patches,
)
from pera_kernels.visible_patches.reference import is_raw
from pera_kernels.visible_patches.triton import (
    MAX_PATCH,
    PIXEL_VARIANTS,
    color_args,
    normalisation,
    normalised,
    signature,
    source,
    tile_shape,
)

from ..aot import Variant
from ..launching import on_their_device


@triton.jit
def targets(
    crops_ptr, index_ptr, order_ptr, factors_ptr, gray_ptr,
    crop, tile, per_crop, columns, stride_n, stride_y, stride_x, stride_c,
    MEAN: tl.constexpr, INVERSE_STD: tl.constexpr, P: tl.constexpr, KIND: tl.constexpr, COLOR: tl.constexpr,
    RED: tl.constexpr, GREEN: tl.constexpr, BLUE: tl.constexpr, PATCHES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """The targets of a tile of RGB patches: three tensors (PATCHES, PIXELS) float32, and where they stand.

    The addresses in `pred` are ``address`` and 8 and 16 values on (P % 8 == 0), else 1 and 2 values on.
    """
    number = tile * PATCHES + tl.arange(0, PATCHES)
    seen = number < per_crop
    row = crop * per_crop + number
    patch = tl.load(index_ptr + row, mask=seen, other=0).to(tl.int32)
    a, b, c = rgb_patches(
        crops_ptr, order_ptr, factors_ptr, gray_ptr, patch, seen, crop, columns, stride_n, stride_y, stride_x,
        stride_c, MEAN, INVERSE_STD, P, PIXELS, KIND, COLOR, RED, GREEN, BLUE,
    )  # fmt: skip
    pixel = tl.arange(0, PIXELS)
    if P % 8 == 0:
        a, b, c = interleave_channels(a, b, c, PATCHES, PIXELS)
        within = pixel // 8 * 24 + pixel % 8
    else:
        within = pixel * 3
    address = (row * (3 * P * P))[:, None] + within[None, :]
    return a, b, c, address, seen[:, None] & (pixel < P * P)[None, :]


@triton.jit
def difference(pred_ptr, target, address, mask):
    """pred - target, 0 where there is none."""
    pred = tl.load(pred_ptr + address, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, pred - target, 0.0)


@triton.jit
def band_differences(
    pred_ptr, grad_pred_ptr, scale, crops_ptr, index_ptr, order_ptr, factors_ptr, gray_ptr,
    crop, tile, per_crop, columns, stride_n, stride_y, stride_x, stride_c,
    MEAN: tl.constexpr, INVERSE_STD: tl.constexpr, P: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr,
    COLOR: tl.constexpr, RED: tl.constexpr, GREEN: tl.constexpr, BLUE: tl.constexpr,
    PATCHES: tl.constexpr, PIXELS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """pred - target of a tile of patches of any number of channels, one channel after the other.

    Forward: the sum of squares over the channels, (PATCHES, PIXELS). BACKWARD: writes the gradient.
    """
    number = tile * PATCHES + tl.arange(0, PATCHES)
    seen = number < per_crop
    row = crop * per_crop + number
    patch = tl.load(index_ptr + row, mask=seen, other=0).to(tl.int32)
    pixel = tl.arange(0, PIXELS)
    mask = seen[:, None] & (pixel < P * P)[None, :]
    at = (row * (C * P * P))[:, None] + (pixel * C)[None, :]
    total = tl.zeros((PATCHES, PIXELS), tl.float32)
    dtype: tl.constexpr = grad_pred_ptr.dtype.element_ty
    if RED >= 0:
        r, g, b = rgb_patches(
            crops_ptr, order_ptr, factors_ptr, gray_ptr, patch, seen, crop, columns, stride_n, stride_y, stride_x,
            stride_c, MEAN, INVERSE_STD, P, PIXELS, KIND, COLOR, RED, GREEN, BLUE,
        )  # fmt: skip
        r = difference(pred_ptr, r, at + RED, mask)
        g = difference(pred_ptr, g, at + GREEN, mask)
        b = difference(pred_ptr, b, at + BLUE, mask)
        if BACKWARD:
            tl.store(grad_pred_ptr + at + RED, (r * scale).to(dtype), mask=mask)
            tl.store(grad_pred_ptr + at + GREEN, (g * scale).to(dtype), mask=mask)
            tl.store(grad_pred_ptr + at + BLUE, (b * scale).to(dtype), mask=mask)
        else:
            total += r * r + g * g + b * b
    address = patch_address(patch, crop, columns, stride_n, stride_y, stride_x, P, PIXELS)
    for c in tl.static_range(C):
        if c != RED and c != GREEN and c != BLUE:
            x = band_patches(
                crops_ptr, order_ptr, factors_ptr, gray_ptr, address, mask, crop, stride_c, MEAN, INVERSE_STD, c, KIND,
                COLOR,
            )  # fmt: skip
            x = difference(pred_ptr, x, at + c, mask)
            if BACKWARD:
                tl.store(grad_pred_ptr + at + c, (x * scale).to(dtype), mask=mask)
            else:
                total += x * x
    return total


@triton.jit
def pixel_loss_fwd_kernel(
    pred_ptr,  # (N * n, P * P * C)
    crops_ptr,  # (N, H, W, C) uint8 or uint16, as int64 words if PACKED; or float (N, C, H, W)
    index_ptr,  # (N, n)
    order_ptr,  # (N, 4), read if COLOR
    factors_ptr,  # (N, 4) float32, read if COLOR
    gray_ptr,  # (N,) float32, read if COLOR
    partial_ptr,  # (programs,) float32
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
    if C == 3 and RED == 0 and GREEN == 1 and BLUE == 2:
        a, b, c, address, mask = targets(
            crops_ptr, index_ptr, order_ptr, factors_ptr, gray_ptr, crop, program % tiles,
            per_crop, columns, stride_n, stride_y, stride_x, stride_c,
            MEAN, INVERSE_STD, P, KIND, COLOR, RED, GREEN, BLUE, PATCHES, PIXELS,
        )  # fmt: skip
        STEP: tl.constexpr = 8 if P % 8 == 0 else 1
        a = difference(pred_ptr, a, address, mask)
        b = difference(pred_ptr, b, address + STEP, mask)
        c = difference(pred_ptr, c, address + 2 * STEP, mask)
        total = a * a + b * b + c * c
    else:
        total = band_differences(
            pred_ptr, pred_ptr, 1.0, crops_ptr, index_ptr, order_ptr, factors_ptr, gray_ptr, crop, program % tiles,
            per_crop, columns, stride_n, stride_y, stride_x, stride_c,
            MEAN, INVERSE_STD, P, C, KIND, COLOR, RED, GREEN, BLUE, PATCHES, PIXELS, False,
        )  # fmt: skip
    tl.store(partial_ptr + program, tl.sum(tl.sum(total, 1), 0))


@triton.jit
def pixel_loss_sum_fwd_kernel(
    partial_ptr,  # (programs,) float32
    loss_ptr,  # () float32
    programs,
    rows,
    BLOCK: tl.constexpr,
):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, programs, BLOCK):
        program = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + program, mask=program < programs, other=0.0)
    tl.store(loss_ptr, tl.sum(total, 0) / rows)


@triton.jit
def pixel_loss_bwd_kernel(
    grad_ptr,  # () upstream
    pred_ptr,  # (N * n, P * P * C)
    crops_ptr,  # (N, H, W, C) uint8 or uint16, as int64 words if PACKED; or float (N, C, H, W)
    index_ptr,  # (N, n)
    order_ptr,  # (N, 4), read if COLOR
    factors_ptr,  # (N, 4) float32, read if COLOR
    gray_ptr,  # (N,) float32, read if COLOR
    grad_pred_ptr,  # (N * n, P * P * C)
    rows,  # N * n
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
    scale = tl.load(grad_ptr).to(tl.float32) * 2.0 / rows
    if C == 3 and RED == 0 and GREEN == 1 and BLUE == 2:
        a, b, c, address, mask = targets(
            crops_ptr, index_ptr, order_ptr, factors_ptr, gray_ptr, crop, program % tiles,
            per_crop, columns, stride_n, stride_y, stride_x, stride_c,
            MEAN, INVERSE_STD, P, KIND, COLOR, RED, GREEN, BLUE, PATCHES, PIXELS,
        )  # fmt: skip
        STEP: tl.constexpr = 8 if P % 8 == 0 else 1
        dtype: tl.constexpr = grad_pred_ptr.dtype.element_ty
        a = difference(pred_ptr, a, address, mask) * scale
        b = difference(pred_ptr, b, address + STEP, mask) * scale
        c = difference(pred_ptr, c, address + 2 * STEP, mask) * scale
        tl.store(grad_pred_ptr + address, a.to(dtype), mask=mask)
        tl.store(grad_pred_ptr + address + STEP, b.to(dtype), mask=mask)
        tl.store(grad_pred_ptr + address + 2 * STEP, c.to(dtype), mask=mask)
    else:
        band_differences(
            pred_ptr, grad_pred_ptr, scale, crops_ptr, index_ptr, order_ptr, factors_ptr, gray_ptr, crop,
            program % tiles, per_crop, columns, stride_n, stride_y, stride_x, stride_c,
            MEAN, INVERSE_STD, P, C, KIND, COLOR, RED, GREEN, BLUE, PATCHES, PIXELS, True,
        )  # fmt: skip


def why_not(pred: Tensor, crops: Tensor, patch_size: int) -> str | None:
    """Why these kernels cannot take the arguments, or None."""
    if torch.float64 in (pred.dtype, crops.dtype):
        return "float64 runs in PyTorch only"
    if patch_size > MAX_PATCH // 2:
        return f"a patch of {patch_size} pixels a side does not fit one block (at most {MAX_PATCH // 2})"
    return None


def _launch(patches: Patches) -> tuple[int, list[Tensor], tuple[int, ...], dict[str, object]]:
    """Programs, tensors, numbers and constants that both directions take."""
    crops, index, order, _, _, mean, std, patch_size, rgb = patches
    read, strides, constants = source(crops, patch_size, rgb)
    channels = constants["C"]
    width = crops.shape[2 if is_raw(crops) else 3]
    per_program, pixels, warps = tile_shape(index.shape[1], patch_size)
    tiles = triton.cdiv(index.shape[1], per_program)
    tensors = [read, index.contiguous(), *color_args(patches, read)]
    constants = {
        **(normalisation(mean, std) if is_raw(crops) else normalisation([0.0] * channels, [1.0] * channels)),
        **constants,
        **{"P": patch_size, "COLOR": order is not None, "PATCHES": per_program, "PIXELS": pixels, "num_warps": warps},
    }
    return index.shape[0] * tiles, tensors, (index.shape[1], tiles, width // patch_size, *strides), constants


@on_their_device
def pixel_loss(
    pred: Tensor,  # (N * n, P * P * C)
    patches: Patches,
) -> Tensor:
    """The loss, () float32."""
    if pred.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=pred.device)
    programs, tensors, numbers, constants = _launch(patches)
    partial = torch.empty(programs, dtype=torch.float32, device=pred.device)
    loss = torch.empty((), dtype=torch.float32, device=pred.device)
    pixel_loss_fwd_kernel[(programs,)](pred.contiguous(), *tensors, partial, *numbers, **constants)
    pixel_loss_sum_fwd_kernel[(1,)](partial, loss, programs, len(pred), BLOCK=1024, num_warps=8)
    return loss


@on_their_device
def pixel_loss_backward(
    grad: Tensor,  # ()
    pred: Tensor,  # (N * n, P * P * C)
    patches: Patches,
) -> Tensor:
    """Gradient for ``pred``, of its shape and dtype."""
    result = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    if pred.numel() == 0:
        return result
    programs, tensors, numbers, constants = _launch(patches)
    pixel_loss_bwd_kernel[(programs,)](grad, pred.contiguous(), *tensors, result, len(pred), *numbers, **constants)
    return result


def _variants() -> list[Variant]:
    recipes = "vit_s16, vit_b16, vit_g16"  # they differ in the width of their tokens, not in their pixels
    patches, pixels, warps = tile_shape(157, 16)
    result = []
    for kind, bands, color, name in PIXEL_VARIANTS:
        constants = {"P": 16, "PATCHES": patches, "PIXELS": pixels, "KIND": kind.value, "COLOR": color}
        constants |= {**bands, **normalised(bands)}
        for kernel in (pixel_loss_fwd_kernel, pixel_loss_bwd_kernel):
            half = {"pred_ptr": "*bf16", "grad_pred_ptr": "*bf16", "grad_ptr": "*fp32", "partial_ptr": "*fp32"}
            types = signature(kernel, kind, **{k: v for k, v in half.items() if k in kernel.arg_names})
            result.append(Variant(f"{recipes} bf16 {name}", kernel, types, constants, warps))
    sums = signature(pixel_loss_sum_fwd_kernel, PACKED, partial_ptr="*fp32", loss_ptr="*fp32")
    result.append(Variant(recipes, pixel_loss_sum_fwd_kernel, sums, {"BLOCK": 1024}, 8))
    return result


VARIANTS = _variants()
