"""`contrast_mean` and `visible_patches` in vectorised PyTorch: the fallback on every device.

Colours only the pixels of visible patches, all crops at once: no loop over crops, no data-dependent shape, no host
synchronisation. What differs between crops is turned into numbers instead of branches:

- brightness, contrast, saturation and grayscale are all `clamp(f*x + (1-f)*(a*gray(x) + b))`: brightness has a=0, b=0;
  contrast a=0, b=mean gray; saturation a=1, b=0; grayscale f=0, a=1, b=0; and f=1 does exactly nothing;
- hue, the costly one, runs once: blends that precede it in a crop's order, then hue, then the blends that follow it.

Images of which some channels are red, green and blue are worked on in two parts, these three and the others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from .arguments import Patches
from .reference import (
    BRIGHTNESS,
    CONTRAST,
    GRAY_WEIGHTS,
    GRAYSCALE,
    HUE,
    LARGEST,
    SATURATION,
    color_channels,
    compute_dtype,
    is_raw,
)

CACHE_VALUES = 1 << 18  # values per chunk on the CPU: temporaries of 1 MiB stay in cache
DEVICE_VALUES = 1 << 24  # elsewhere: few launches, temporaries of 64 MiB


def chunk_length(values: int, device: torch.device) -> int:
    """Number of items that are worked on at a time, for a number of values each."""
    return max(1, (CACHE_VALUES if device.type == "cpu" else DEVICE_VALUES) // values)


def _luma(x: Tensor) -> Tensor:
    """RGB [R, 3, Q] -> [R, 1, Q]."""
    red, green, blue = GRAY_WEIGHTS
    return (red * x[:, 0:1]).add_(x[:, 1:2], alpha=green).add_(x[:, 2:3], alpha=blue)


def _gray(x: Tensor, rgb: list[int]) -> Tensor:
    """[R, C, Q] -> [R, 1, Q]: luma if there is nothing but RGB, else the mean over all channels."""
    if len(rgb) != x.shape[1]:
        return x.mean(1, keepdim=True)
    return _luma(_take(x, rgb))


def _take(x: Tensor, channels: list[int]) -> Tensor:
    """Some channels of x [R, C, Q]; x itself if they are all of them, in order. No index tensor: none to copy."""
    if channels == list(range(x.shape[1])):
        return x
    return torch.stack([x[:, channel] for channel in channels], 1)


def _blend(x: Tensor, code: Tensor, factors: Tensor, mean_gray: Tensor, is_rgb: bool) -> Tensor:
    """The blend that `code` [R] stands for, on x [R, C, Q]; rows with any other code come back unchanged."""
    is_contrast = code == CONTRAST
    f = torch.where(code == BRIGHTNESS, factors[:, BRIGHTNESS], torch.where(is_contrast, factors[:, CONTRAST], 1))
    other = torch.where(is_contrast, mean_gray, 0)[:, None, None]
    if is_rgb:
        f = torch.where(code == SATURATION, factors[:, SATURATION], torch.where(code == GRAYSCALE, 0, f))
        takes_gray = ((code == SATURATION) | (code == GRAYSCALE)).to(x.dtype)
        other = torch.addcmul(other, takes_gray[:, None, None], _luma(x))
    return torch.lerp(other, x, f[:, None, None]).clamp_(0, 1)


def _shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Hue of x [R, 3, Q] moved by `turns` [R]: HSV, with saturation * value kept as the chroma it is."""
    r, g, b = x.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    low = torch.minimum(torch.minimum(r, g), b)
    chroma = value - low
    # Choices are sums over masks of 0 and 1, of which one is 1: PyTorch does not vectorise `where` and `%` on the CPU.
    is_red = (value == r).to(x.dtype)
    is_green = (value == g).to(x.dtype).mul_(1 - is_red)
    is_blue = 1 - is_red - is_green
    rise = (g - b).mul_(is_red).addcmul_(b - r, is_green).addcmul_(r - g, is_blue)
    hue = rise.div_(chroma.clamp_min(torch.finfo(x.dtype).tiny))  # in sixths
    hue.add_(is_green, alpha=2).add_(is_blue, alpha=4).add_(6 * turns[:, None])
    hue.sub_(hue.div(6).floor_(), alpha=6)
    weights = (hue - 3).abs_() - 1, 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()  # of red, green, blue
    shifted = torch.empty_like(x)
    for out, weight in zip(shifted.unbind(1), weights, strict=True):
        torch.add(low, weight.clamp_(0, 1).mul_(chroma), out=out)
    return shifted


def apply_ops(x: Tensor, order: Tensor, factors: Tensor, mean_gray: Tensor, rgb: list[int]) -> Tensor:
    """Colour operations, each at most once per row, left to right.

    Args:
        x: float [R, C, Q] in [0, 1].
        order: integer [R, K], operation codes.
        factors: [R, 4], dtype of x.
        mean_gray: [R], dtype of x.
        rgb: numbers of the red, green and blue channel, or [].

    Returns:
        [R, C, Q] in [0, 1].
    """
    others = [channel for channel in range(x.shape[1]) if channel not in rgb]
    if not rgb:
        return _apply_blends(x, order, factors, mean_gray)
    color = _apply_to_rgb(_take(x, rgb), order, factors, mean_gray)
    if not others:
        return _take(color, [rgb.index(channel) for channel in range(3)])
    rest = _apply_blends(_take(x, others), order, factors, mean_gray)
    return _merge(color, rgb, rest, others)


def _merge(color: Tensor, rgb: list[int], rest: Tensor, others: list[int]) -> Tensor:
    """[R, 3, Q] and [R, C-3, Q] -> [R, C, Q], each channel in its place."""
    return _take(torch.cat([color, rest], 1), [(rgb + others).index(channel) for channel in range(len(rgb + others))])


def _apply_blends(x: Tensor, order: Tensor, factors: Tensor, mean_gray: Tensor) -> Tensor:
    """Brightness and contrast, the only operations that channels have which are no colours."""
    for step in range(order.shape[1]):
        x = _blend(x, order[:, step], factors, mean_gray, is_rgb=False)
    return x


def _apply_to_rgb(x: Tensor, order: Tensor, factors: Tensor, mean_gray: Tensor) -> Tensor:
    steps = order.shape[1]
    is_hue = order == HUE
    after_hue = is_hue.cumsum(1) > 0
    for step in range(steps):
        x = _blend(x, order[:, step].masked_fill(after_hue[:, step], -1), factors, mean_gray, is_rgb=True)
    shifted = _shift_hue(x, factors[:, HUE])
    x = torch.where(is_hue.any(1)[:, None, None], shifted, x)
    for step in range(1, steps):
        x = _blend(x, order[:, step].masked_fill(~after_hue[:, step], -1), factors, mean_gray, is_rgb=True)
    return x


def contrast_mean(
    crops: Tensor, order: Tensor, factors: Tensor, dtype: torch.dtype = torch.float32, rgb: Sequence[int] | None = None
) -> Tensor:
    """See `reference.contrast_mean`.

    On the CPU, where looking at the order costs nothing, each crop that has contrast is worked on by itself, with the
    operations that it has. Elsewhere (and for fake tensors) all crops are gone through: which of them need it is known
    on the device only.
    """
    if crops.device.type == "cpu" and not is_fake(crops):
        return _contrast_mean_on_cpu(crops, order, factors, dtype, rgb)
    n, h, w, c = crops.shape
    color, largest = color_channels(c, rgb), LARGEST[crops.dtype]
    has_contrast = (order == CONTRAST).any(1)
    # codes from contrast on do not count; contrast itself stands at most last, so the last column is never needed
    before = order.masked_fill((order == CONTRAST).cumsum(1) > 0, -1)[:, :-1]
    factors = factors.to(dtype)
    means = torch.empty(n, dtype=dtype, device=crops.device)
    step = chunk_length(h * w * c, crops.device)
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        x = crops[part].reshape(-1, h * w, c).transpose(1, 2).to(dtype).contiguous().div_(largest)
        x = apply_ops(x, before[part], factors[part], torch.zeros_like(means[part]), color)
        means[part] = _gray(x, color).mean((1, 2))
    return torch.where(has_contrast, means, 0)


def _contrast_mean_on_cpu(
    crops: Tensor, order: Tensor, factors: Tensor, dtype: torch.dtype, rgb: Sequence[int] | None
) -> Tensor:
    _, height, width, channels = crops.shape
    color, largest = color_channels(channels, rgb), LARGEST[crops.dtype]
    lines = max(1, CACHE_VALUES // 2 // (width * channels))  # of a tile: its few temporaries fit the cache together
    means = torch.zeros(len(crops), dtype=dtype)
    for i, (codes, values) in enumerate(zip(order.tolist(), factors.tolist(), strict=True)):
        if CONTRAST not in codes:
            continue
        before = codes[: codes.index(CONTRAST)]
        for tile in crops[i].split(lines):
            x = tile.reshape(1, -1, channels).transpose(1, 2).to(dtype, memory_format=torch.contiguous_format)
            x = x.div_(largest)
            for code in before:
                x = _apply_op(x, code, values, color)
            means[i] += _gray(x, color).sum()
    return means.div_(height * width)


def _apply_op(x: Tensor, code: int, factors: list[float], rgb: list[int]) -> Tensor:
    """An operation other than contrast on x [R, C, Q], which it may overwrite."""
    if code == BRIGHTNESS:
        return x.mul_(factors[BRIGHTNESS]).clamp_(0, 1)
    if not rgb or code not in (SATURATION, HUE, GRAYSCALE):
        return x
    if rgb == [0, 1, 2] and x.shape[1] == 3:
        return _color_op(x, code, factors)
    for channel, changed in zip(rgb, _color_op(_take(x, rgb), code, factors).unbind(1), strict=True):
        x[:, channel] = changed
    return x


def _color_op(x: Tensor, code: int, factors: list[float]) -> Tensor:
    """Saturation, hue or grayscale on RGB [R, 3, Q]."""
    if code == SATURATION:
        return torch.lerp(_luma(x), x, factors[SATURATION]).clamp_(0, 1)
    if code == HUE:
        return _shift_hue(x, x.new_full((x.shape[0],), factors[HUE]))
    return _luma(x).expand_as(x)


def patch_rows(
    patches: Patches,
    crop: Tensor,  # int64 [R], which crop
    patch: Tensor,  # int64 [R], which patch of it
    compute: torch.dtype,
) -> Tensor:
    """Pixels of R patches, coloured and normalised: [R, C, P, P] of dtype `compute`."""
    crops, _, order, factors, gray_mean, mean, std, p, rgb = patches
    images = crops if is_raw(crops) else crops.permute(0, 2, 3, 1)
    columns = images.shape[2] // p
    grid = images.unflatten(1, (-1, p)).unflatten(3, (columns, p))  # [N, rows, P, columns, P, C], a view
    x = grid[crop, patch // columns, :, patch % columns]  # [R, P, P, C]: nothing but these pixels is read
    x = x.permute(0, 3, 1, 2).to(compute, memory_format=torch.contiguous_format)
    if not is_raw(crops):
        return x
    x = x.div_(LARGEST[crops.dtype])
    if order is not None and factors is not None and gray_mean is not None:
        codes, turns, means = order[crop], factors[crop].to(compute), gray_mean[crop].to(compute)
        x = apply_ops(x.flatten(2), codes, turns, means, color_channels(x.shape[1], rgb)).unflatten(2, (p, p))
    for channel, (center, scale) in enumerate(zip(mean, std, strict=True)):  # numbers, not tensors: no copy to a device
        x[:, channel].sub_(center).div_(scale)
    return x


def row_addresses(index: Tensor) -> tuple[Tensor, Tensor]:
    """index [N, n] -> crop and patch of each row, int64 [N*n]."""
    n, per_crop = index.shape
    crop = torch.arange(n, device=index.device)[:, None].expand(n, per_crop).reshape(-1)
    return crop, index.reshape(-1).long()


def with_gray_mean(patches: Patches, compute: torch.dtype) -> Patches:
    """The same with the gray mean, in dtype `compute`, where there is colour and it is not known."""
    crops, _, order, factors, gray_mean, *_ = patches
    if order is None or factors is None or gray_mean is not None:
        return patches
    return patches._replace(gray_mean=contrast_mean(crops, order, factors, compute, patches.rgb))


def visible_patches(patches: Patches, dtype: torch.dtype) -> Tensor:
    """See `op.visible_patches`. `gray_mean` None: computed here."""
    compute, crops = compute_dtype(dtype), patches.crops
    patches = with_gray_mean(patches, compute)
    crop, patch = row_addresses(patches.index)
    channels = crops.shape[3 if is_raw(crops) else 1]
    rows = torch.empty(len(patch), channels * patches.patch_size**2, dtype=dtype, device=crops.device)
    step = chunk_length(rows.shape[1], crops.device)
    for start in range(0, len(patch), step):
        part = slice(start, start + step)
        rows[part] = patch_rows(patches, crop[part], patch[part], compute).flatten(1)
    return rows
