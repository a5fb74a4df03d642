"""Definition of `contrast_mean` and `visible_patches` in plain PyTorch, on one whole crop after the other.

Nothing here is fast. Tests and benches compare every other implementation with this one; it runs in float64 when
float64 rows are asked for, in float32 otherwise. Source: docs/method.md section 2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAYSCALE, NOTHING = 0, 1, 2, 3, 4, -1
GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # of red, green, blue; torchvision's, which sum to .9999
LARGEST = {
    torch.uint8: 255,
    torch.uint16: 65535,
}  # of the types that crops have before they are normalised: stands for 1


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision in which colours and sums are computed: float64 for float64 results, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def color_channels(channels: int, rgb: Sequence[int] | None) -> list[int]:
    """Channels that are red, green and blue; [] if there are none. None: the first three of three, else none."""
    if rgb is None:
        return [0, 1, 2] if channels == 3 else []
    return list(rgb)


def luma(color: Tensor) -> Tensor:
    """RGB [3, H, W] -> [H, W]."""
    return GRAY_WEIGHTS[0] * color[0] + GRAY_WEIGHTS[1] * color[1] + GRAY_WEIGHTS[2] * color[2]


def gray(image: Tensor, rgb: Sequence[int] | None = None) -> Tensor:
    """Gray of `image` [C, H, W] -> [H, W]: luma if it is nothing but RGB, else the plain mean over all channels."""
    color = color_channels(image.shape[0], rgb)
    return luma(image[color]) if len(color) == image.shape[0] else image.mean(0)


def blend(image: Tensor, other: Tensor | float, factor: float) -> Tensor:
    """`factor` parts of `image` and the rest of `other`, clamped to [0, 1]."""
    return (factor * image + (1 - factor) * other).clamp(0, 1)


def rgb_to_hsv(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """RGB [3, H, W] in [0, 1] -> hue in turns [0, 1), saturation and value in [0, 1], each [H, W]; gray has hue 0."""
    r, g, b = image
    value = image.amax(0)
    chroma = value - image.amin(0)
    is_gray = chroma == 0
    divisor = torch.where(is_gray, 1, chroma)
    sixths = torch.where(
        value == r,
        (g - b) / divisor,
        torch.where(value == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor),
    )
    hue = torch.where(is_gray, 0, (sixths / 6) % 1)
    saturation = chroma / torch.where(value == 0, 1, value)
    return hue, saturation, value


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Inverse of `rgb_to_hsv`: three [H, W] -> [3, H, W]."""

    def channel(offset: int) -> Tensor:
        k = (offset + hue * 6) % 6
        return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)

    return torch.stack([channel(5), channel(3), channel(1)])


def apply_op(
    image: Tensor,
    code: int,
    factors: list[float],
    mean_gray: float | Tensor | None = None,
    rgb: Sequence[int] | None = None,
) -> Tensor:
    """One colour operation of torchvision's `adjust_*` on a float image.

    Args:
        image: [C, H, W] in [0, 1].
        code: 0 brightness, 1 contrast, 2 saturation, 3 hue, 4 grayscale, anything else nothing. Brightness and contrast
            act on all channels; saturation, hue and grayscale on the red, green and blue ones.
        factors: of brightness, contrast, saturation, hue (a shift in turns); the factor of an operation stands at the
            index of its code.
        mean_gray: what contrast blends with; None: the mean gray of `image` (the definition).
        rgb: numbers of the red, green and blue channel, or []; None: see `color_channels`.

    Returns:
        [C, H, W] in [0, 1].
    """
    if code == BRIGHTNESS:
        return blend(image, 0.0, factors[BRIGHTNESS])
    if code == CONTRAST:
        return blend(image, gray(image, rgb).mean() if mean_gray is None else mean_gray, factors[CONTRAST])
    if not (chosen := color_channels(image.shape[0], rgb)):
        return image
    result = image.clone()
    result[chosen] = _color_op(image[chosen], code, factors)
    return result


def _color_op(image: Tensor, code: int, factors: list[float]) -> Tensor:
    """An operation that RGB images [3, H, W] have."""
    if code == SATURATION:
        return blend(image, luma(image), factors[SATURATION])
    if code == HUE:
        hue, saturation, value = rgb_to_hsv(image)
        return hsv_to_rgb((hue + factors[HUE]) % 1, saturation, value)
    if code == GRAYSCALE:
        return luma(image).expand(3, -1, -1)
    return image


def is_raw(crops: Tensor) -> bool:
    """Whether crops are integer pixels [N, H, W, C], to be scaled and normalised; else they are views [N, C, H, W]."""
    return crops.dtype in LARGEST


def unit_images(crops: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 or uint16 [N, H, W, C] -> [N, C, H, W] in [0, 1]."""
    return crops.permute(0, 3, 1, 2).to(dtype) / LARGEST[crops.dtype]


def contrast_mean(
    crops: Tensor, order: Tensor, factors: Tensor, dtype: torch.dtype = torch.float32, rgb: Sequence[int] | None = None
) -> Tensor:
    """Mean gray of each crop where contrast comes in its order; 0 for crops whose order does not hold contrast.

    Args:
        crops: uint8 or uint16 [N, H, W, C].
        order: integer [N, K], operation codes, applied left to right.
        factors: [N, 4].
        dtype: float32 or float64.
        rgb: see `apply_op`.

    Returns:
        [N] of `dtype`.
    """
    means = torch.zeros(crops.shape[0], dtype=dtype, device=crops.device)
    for crop, image in enumerate(unit_images(crops, dtype)):
        codes = order[crop].tolist()
        if CONTRAST not in codes:
            continue
        for code in codes[: codes.index(CONTRAST)]:
            image = apply_op(image, code, factors[crop].tolist(), rgb=rgb)
        means[crop] = gray(image, rgb).mean()
    return means


def visible_patches(
    crops: Tensor,  # uint8 or uint16 [N, H, W, C], or float [N, C, H, W]
    index: Tensor,  # [N, n]
    order: Tensor | None,  # [N, K]
    factors: Tensor | None,  # [N, 4]
    gray_mean: Tensor | None,  # [N]
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int,
    dtype: torch.dtype,
    rgb: Sequence[int] | None = None,
) -> Tensor:  # [N*n, C*P*P]
    """Rows of the visible patches, see `op.visible_patches`. Colours whole crops, then takes the patches."""
    compute = compute_dtype(dtype)
    if is_raw(crops):
        images = unit_images(crops, compute)
        if order is not None and factors is not None:
            images = images.clone()
            for crop in range(len(images)):
                mean_gray = None if gray_mean is None else gray_mean[crop].to(compute)
                for code in order[crop].tolist():
                    images[crop] = apply_op(images[crop], code, factors[crop].tolist(), mean_gray, rgb)
        shape = (1, len(mean), 1, 1)
        images = images - torch.tensor(mean, dtype=compute, device=crops.device).view(shape)
        images = images / torch.tensor(std, dtype=compute, device=crops.device).view(shape)
    else:
        images = crops.to(compute)
    n, c, h, w = images.shape
    p = patch_size
    patches = images.reshape(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(n, (h // p) * (w // p), c * p * p)
    picked = [patches[crop, index[crop].long()] for crop in range(n)]
    return torch.cat([patches.new_empty(0, c * p * p), *picked]).to(dtype)
