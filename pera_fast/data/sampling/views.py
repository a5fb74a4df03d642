"""Keyed draws of a sample: crop windows, flips and the colour jitter of both views (docs/method.md section 2).

Every draw is a pure function of (seed, epoch, sample), so it can be redrawn alone. Per sample a fixed number of
uniforms is taken from its generator, global crops first; the rest is arithmetic on whole batches.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pera_fast.keyed import Purpose, generator

_TRIES = 10  # windows tried before the central crop, as torchvision's RandomResizedCrop does
_UNIFORMS_WINDOW = 4 * _TRIES + 2
_UNIFORMS_COLOR = 10

GRAYSCALE = 4  # op code; 0 brightness, 1 contrast, 2 saturation, 3 hue are also indices into the factors
NOTHING = -1
_NEUTRAL = (1.0, 1.0, 1.0, 0.0)


@dataclass
class Windows:
    """Crop windows in pixels of the decoded image, and flips. All arrays are [crops, B]."""

    top: np.ndarray  # int64
    left: np.ndarray  # int64
    height: np.ndarray  # int64, >= 1
    width: np.ndarray  # int64, >= 1
    hflip: np.ndarray  # bool
    vflip: np.ndarray  # bool

    def roi(self) -> tuple[np.ndarray, np.ndarray]:
        """(start, end) float32 [crops, B, 2] in order (y, x); start > end along an axis means a flip."""
        near = np.stack([self.top, self.left], axis=-1).astype(np.float32)
        far = np.stack([self.top + self.height, self.left + self.width], axis=-1).astype(np.float32)
        flip = np.stack([self.vflip, self.hflip], axis=-1)
        return np.ascontiguousarray(np.where(flip, far, near)), np.ascontiguousarray(np.where(flip, near, far))


def _uniforms(seed: int, purpose: Purpose, epoch: int, samples: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """float64 [B, *shape] in [0, 1)."""
    out = np.empty((len(samples), *shape))
    for row, sample in zip(out, samples, strict=True):
        generator(seed, purpose, epoch, int(sample)).random(out=row)
    return out


def draw_windows(views: Any, seed: int, epoch: int, samples: np.ndarray, sizes: np.ndarray) -> Windows:
    """Windows with the semantics of torchvision's RandomResizedCrop.get_params, and flips.

    Args:
        views: cfg.views.
        seed: the run's seed.
        epoch: epoch of the draw.
        samples: int64 [B], row ids.
        sizes: int64 [B, 2], (height, width) of each decoded image.

    Returns:
        Windows of all num_global + num_local crops, global ones first.
    """
    crops = views.num_global + views.num_local
    u = _uniforms(seed, Purpose.WINDOW, epoch, samples, (crops, _UNIFORMS_WINDOW))
    tries = u[..., :-2].reshape(len(samples), crops, _TRIES, 4)
    full_h, full_w = (sizes[:, axis].astype(np.float64)[:, None] for axis in (0, 1))  # [B, 1]

    low, high = np.array([views.global_scale] * views.num_global + [views.local_scale] * views.num_local).T
    scale = low[:, None] + (high - low)[:, None] * tries[..., 0]  # [B, crops, tries]
    area = (full_h * full_w)[..., None] * scale
    narrow, wide = views.aspect
    ratio = np.exp(math.log(narrow) + (math.log(wide) - math.log(narrow)) * tries[..., 1])
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (width > 0) & (width <= full_w[..., None]) & (height > 0) & (height <= full_h[..., None])
    first = fits.argmax(axis=-1)[..., None]
    found = fits.any(axis=-1)  # [B, crops]
    width, height, u_top, u_left = (
        np.take_along_axis(values, first, axis=-1)[..., 0] for values in (width, height, tries[..., 2], tries[..., 3])
    )

    # The central crop: the whole image, cut to the nearest allowed aspect.
    image_ratio = full_w / full_h
    central_w = np.where(image_ratio > wide, np.rint(full_h * wide), full_w)
    central_h = np.where(image_ratio < narrow, np.rint(full_w / narrow), full_h)
    width, height = np.where(found, width, central_w), np.where(found, height, central_h)
    top = np.where(found, np.floor(u_top * (full_h - height + 1)), (full_h - height) // 2)
    left = np.where(found, np.floor(u_left * (full_w - width + 1)), (full_w - width) // 2)
    top, left, height, width = (values.T.astype(np.int64) for values in (top, left, height, width))
    u_hflip, u_vflip = u[..., -2].T, u[..., -1].T
    return Windows(top, left, height, width, hflip=u_hflip < views.hflip, vflip=u_vflip < views.vflip)


def draw_colors(
    views: Any, seed: int, epoch: int, samples: np.ndarray, has_colors: bool = True
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Colour operations of the student views and the teacher views.

    Args:
        views: cfg.views.
        seed: the run's seed.
        epoch: epoch of the draw.
        samples: int64 [B], row ids.
        has_colors: whether the images have red, green and blue. Without, saturation, hue and grayscale are left out (op
            code -1) and the other draws stay what they are.

    Returns:
        ((order, factors) of the student, (order, factors) of the teacher): int32 and float32 [crops, B, 4], as in
        `ColorParams`.
    """
    crops = views.num_global + views.num_local
    u = _uniforms(seed, Purpose.COLOR, epoch, samples, (crops, 2, _UNIFORMS_COLOR)).swapaxes(0, 1)
    student, teacher = u[:, :, 0], u[:, :, 1]  # [crops, B, 10] each: changed?, gray?, 4 order keys, 4 factors
    changed = student[..., 0] < views.student_color
    gray = changed & (student[..., 1] < views.student_gray)
    return (
        _color_ops(views, student, changed & ~gray, gray, has_colors),
        _color_ops(views, teacher, teacher[..., 0] < views.teacher_color, np.zeros_like(gray), has_colors),
    )


def _color_ops(
    views: Any, u: np.ndarray, jitter: np.ndarray, gray: np.ndarray, has_colors: bool
) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(u[..., 2:6], axis=-1).astype(np.int32)  # ranks of uniforms: every order equally likely
    order[~jitter] = NOTHING
    order[gray, 0] = GRAYSCALE
    if not has_colors:
        order[order >= 2] = NOTHING
    reach = np.array([views.brightness, views.contrast, views.saturation, views.hue])
    neutral = np.array(_NEUTRAL)
    factors = np.where(jitter[..., None], neutral + reach * (2 * u[..., 6:10] - 1), neutral)
    return order, factors.astype(np.float32)
