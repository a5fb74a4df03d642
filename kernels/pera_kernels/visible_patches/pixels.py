"""Triton functions on pixels and colours that visible_patches, contrast_mean and pixel_loss share.

Packed RGB crops are read as 64-bit words: three words hold eight pixels, so a patch of 16 x 16 pixels is 96 loads and
not 768. The eight pixels stay in one thread, which writes 16 bytes of bfloat16 at once. A program works on patches of
one crop, so its colour operations are branches that all of its threads take together, and an operation that the crop
does not have costs nothing.
"""

# Called from Python a kernel function raises, so pyright takes its results for nothing.
# pyright: reportGeneralTypeIssues=false
import triton
import triton.language as tl
from torch import Tensor

PACKED = tl.constexpr(0)  # uint8 RGB in one block of memory, lines of whole words
BYTES = tl.constexpr(1)  # uint8 with any strides
VIEWS = tl.constexpr(2)  # floating point with any strides: normalised already
SHORTS = tl.constexpr(3)  # uint16 with any strides

TILE_PIXELS = 1024  # pixels of one program: 8 for each of 128 threads


def is_packed(crops: Tensor, patch_size: int) -> bool:
    """Whether crops (uint8 [N, H, W, C]) can be read as PACKED."""
    aligned = crops.shape[2] % 8 == 0 and patch_size % 8 == 0 and crops.data_ptr() % 8 == 0
    return crops.shape[3] == 3 and aligned and crops.is_contiguous()


@triton.jit
def unit_clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def luma(r, g, b):
    return 0.2989 * r + 0.587 * g + 0.114 * b


@triton.jit
def shift_hue(r, g, b, turns):
    """Hue moved by ``turns``; a channel is low + chroma * w(hue), 0 <= w <= 1, hue in sixths of a turn."""
    high = tl.maximum(r, tl.maximum(g, b))
    low = tl.minimum(r, tl.minimum(g, b))
    chroma = high - low
    is_red = high == r
    is_green = high == g
    rise = tl.where(is_red, g - b, tl.where(is_green, b - r, r - g))
    start = tl.where(is_red, 0.0, tl.where(is_green, 2.0, 4.0))
    hue = rise / tl.where(chroma > 0.0, chroma, 1.0) + start + 6.0 * (turns - tl.floor(turns))  # in [-1, 11]
    hue = tl.where(hue >= 6.0, hue - 6.0, hue)
    hue = tl.where(hue < 0.0, hue + 6.0, hue)
    r = low + chroma * unit_clamp(tl.abs(hue - 3.0) - 1.0)
    g = low + chroma * unit_clamp(2.0 - tl.abs(hue - 2.0))
    b = low + chroma * unit_clamp(2.0 - tl.abs(hue - 4.0))
    return r, g, b


@triton.jit
def color_step(r, g, b, code, brightness, contrast, saturation, hue, mean_gray):
    """The operation with that code (a scalar) on planes in [0, 1]; any other code does nothing."""
    if (code == 0) | (code == 1):
        factor = tl.where(code == 0, brightness, contrast)
        offset = tl.where(code == 0, 0.0, (1.0 - contrast) * mean_gray)
        r = unit_clamp(factor * r + offset)
        g = unit_clamp(factor * g + offset)
        b = unit_clamp(factor * b + offset)
    elif (code == 2) | (code == 4):
        factor = tl.where(code == 2, saturation, 0.0)
        gray = (1.0 - factor) * luma(r, g, b)
        r = unit_clamp(factor * r + gray)
        g = unit_clamp(factor * g + gray)
        b = unit_clamp(factor * b + gray)
    elif code == 3:
        r, g, b = shift_hue(r, g, b, hue)
    return r, g, b


@triton.jit
def blend_step(x, code, brightness, contrast, mean_gray):
    """``color_step`` for a channel that is no colour."""
    if (code == 0) | (code == 1):
        factor = tl.where(code == 0, brightness, contrast)
        x = unit_clamp(factor * x + tl.where(code == 0, 0.0, (1.0 - contrast) * mean_gray))
    return x


@triton.jit
def eight(a, b, c, d, e, f, g, h):
    """[..., G] each -> [..., 8 * G]: a0 b0 ... h0 a1 b1 ... (in registers)."""
    even = tl.join(tl.join(a, e), tl.join(c, g))
    odd = tl.join(tl.join(b, f), tl.join(d, h))
    x = tl.join(even, odd)
    return tl.reshape(x, x.shape[:-4] + [8 * x.shape[-4]])  # noqa: RUF005 (Triton knows no starred list)


@triton.jit
def _bytes(word):
    """The eight bytes of each 64-bit word, in the order of memory."""
    low, high = word.to(tl.int32), (word >> 32).to(tl.int32)
    return (
        (low & 255).to(tl.float32),
        ((low >> 8) & 255).to(tl.float32),
        ((low >> 16) & 255).to(tl.float32),
        ((low >> 24) & 255).to(tl.float32),
        (high & 255).to(tl.float32),
        ((high >> 8) & 255).to(tl.float32),
        ((high >> 16) & 255).to(tl.float32),
        ((high >> 24) & 255).to(tl.float32),
    )


@triton.jit
def load_packed(words_ptr, address, mask):
    """Pixels of three words each -> planes [..., 8 * G] in [0, 1]; address and mask [..., G], in words."""
    r0, g0, b0, r1, g1, b1, r2, g2 = _bytes(tl.load(words_ptr + address, mask=mask, other=0))
    b2, r3, g3, b3, r4, g4, b4, r5 = _bytes(tl.load(words_ptr + address + 1, mask=mask, other=0))
    g5, b5, r6, g6, b6, r7, g7, b7 = _bytes(tl.load(words_ptr + address + 2, mask=mask, other=0))
    r = eight(r0, r1, r2, r3, r4, r5, r6, r7) * (1.0 / 255.0)
    g = eight(g0, g1, g2, g3, g4, g5, g6, g7) * (1.0 / 255.0)
    b = eight(b0, b1, b2, b3, b4, b5, b6, b7) * (1.0 / 255.0)
    return r, g, b


@triton.jit
def _phases(x, PATCHES: tl.constexpr, GROUPS: tl.constexpr):
    """The inverse of ``eight``."""
    even, odd = tl.split(tl.reshape(x, (PATCHES, GROUPS, 2, 2, 2)))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def interleave_channels(r, g, b, PATCHES: tl.constexpr, PIXELS: tl.constexpr):
    """Planes (PATCHES, PIXELS) -> the 24 values of each group of eight pixels in the order of the crop's bytes.

    Three tensors (PATCHES, PIXELS): value i of tensor k stands at 24 * (i // 8) + 8 * k + i % 8. Registers only.
    """
    r0, r1, r2, r3, r4, r5, r6, r7 = _phases(r, PATCHES, PIXELS // 8)
    g0, g1, g2, g3, g4, g5, g6, g7 = _phases(g, PATCHES, PIXELS // 8)
    b0, b1, b2, b3, b4, b5, b6, b7 = _phases(b, PATCHES, PIXELS // 8)
    first = eight(r0, g0, b0, r1, g1, b1, r2, g2)
    second = eight(b2, r3, g3, b3, r4, g4, b4, r5)
    third = eight(g5, b5, r6, g6, b6, r7, g7, b7)
    return first, second, third


@triton.jit
def load_channel(crops_ptr, address, mask, KIND: tl.constexpr):
    x = tl.load(crops_ptr + address, mask=mask, other=0).to(tl.float32)
    if KIND == BYTES:
        x = x * (1.0 / 255.0)
    elif KIND == SHORTS:
        x = x * (1.0 / 65535.0)
    return x


@triton.jit
def patch_address(
    patch,  # (PATCHES,) int32, numbers in raster order
    crop,  # int64
    columns,  # patches per line of patches
    stride_n,
    stride_y,
    stride_x,
    P: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Address of each pixel of the patches (PATCHES, PIXELS) in the first channel, in elements (int64)."""
    pixel = tl.arange(0, PIXELS)
    top, left = (patch // columns).to(tl.int64) * P, (patch % columns).to(tl.int64) * P
    base = crop * stride_n + top * stride_y + left * stride_x
    within = (pixel // P).to(tl.int64) * stride_y + (pixel % P).to(tl.int64) * stride_x
    return base[:, None] + within[None, :]


@triton.jit
def rgb_patches(
    crops_ptr,  # (N, H, W, C) uint8 or uint16, as int64 words if PACKED; or float
    order_ptr,  # (N, 4), read if COLOR
    factors_ptr,  # (N, 4) float32, read if COLOR
    gray_ptr,  # (N,) float32, read if COLOR
    patch,  # (PATCHES,) int32
    seen,  # (PATCHES,) whether there is such a patch
    crop,  # int64
    columns,
    stride_n,
    stride_y,
    stride_x,
    stride_c,
    MEAN: tl.constexpr,
    INVERSE_STD: tl.constexpr,
    P: tl.constexpr,
    PIXELS: tl.constexpr,
    KIND: tl.constexpr,
    COLOR: tl.constexpr,
    RED: tl.constexpr,
    GREEN: tl.constexpr,
    BLUE: tl.constexpr,
):
    """Planes (PATCHES, PIXELS) of red, green and blue of patches of one crop, coloured and normalised, float32."""
    if KIND == PACKED:
        group = tl.arange(0, PIXELS // 8)
        line, word = group // (P // 8), (group % (P // 8)) * 3
        base = crop * stride_n + (patch // columns).to(tl.int64) * P * stride_y + (patch % columns) * (P // 8 * 3)
        address = base[:, None] + (line * stride_y + word)[None, :]
        r, g, b = load_packed(crops_ptr, address, seen[:, None] & (line < P)[None, :])
    else:
        address = patch_address(patch, crop, columns, stride_n, stride_y, stride_x, P, PIXELS)
        mask = seen[:, None] & (tl.arange(0, PIXELS) < P * P)[None, :]
        r = load_channel(crops_ptr, address + RED * stride_c, mask, KIND)
        g = load_channel(crops_ptr, address + GREEN * stride_c, mask, KIND)
        b = load_channel(crops_ptr, address + BLUE * stride_c, mask, KIND)
    if COLOR:
        f0 = tl.load(factors_ptr + crop * 4)
        f1 = tl.load(factors_ptr + crop * 4 + 1)
        f2 = tl.load(factors_ptr + crop * 4 + 2)
        f3 = tl.load(factors_ptr + crop * 4 + 3)
        mean_gray = tl.load(gray_ptr + crop)
        r, g, b = color_step(r, g, b, tl.load(order_ptr + crop * 4), f0, f1, f2, f3, mean_gray)
        r, g, b = color_step(r, g, b, tl.load(order_ptr + crop * 4 + 1), f0, f1, f2, f3, mean_gray)
        r, g, b = color_step(r, g, b, tl.load(order_ptr + crop * 4 + 2), f0, f1, f2, f3, mean_gray)
        r, g, b = color_step(r, g, b, tl.load(order_ptr + crop * 4 + 3), f0, f1, f2, f3, mean_gray)
    if KIND != VIEWS:
        r = (r - MEAN[RED]) * INVERSE_STD[RED]
        g = (g - MEAN[GREEN]) * INVERSE_STD[GREEN]
        b = (b - MEAN[BLUE]) * INVERSE_STD[BLUE]
    return r, g, b


@triton.jit
def band_patches(
    crops_ptr,
    order_ptr,
    factors_ptr,
    gray_ptr,
    address,  # (PATCHES, PIXELS) int64, of the pixels in the first channel
    mask,
    crop,  # int64
    stride_c,
    MEAN: tl.constexpr,
    INVERSE_STD: tl.constexpr,
    CHANNEL: tl.constexpr,
    KIND: tl.constexpr,
    COLOR: tl.constexpr,
):
    """``rgb_patches`` for a channel that is no colour: (PATCHES, PIXELS) float32."""
    x = load_channel(crops_ptr, address + CHANNEL * stride_c, mask, KIND)
    if COLOR:
        f0, f1 = tl.load(factors_ptr + crop * 4), tl.load(factors_ptr + crop * 4 + 1)
        for step in tl.static_range(4):
            x = blend_step(x, tl.load(order_ptr + crop * 4 + step), f0, f1, tl.load(gray_ptr + crop))
    if KIND != VIEWS:
        x = (x - MEAN[CHANNEL]) * INVERSE_STD[CHANNEL]
    return x
