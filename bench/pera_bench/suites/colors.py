"""Crops as a training step has them, for the suites that read pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pera_bench.point import Point
from pera_kernels import backend
from pera_kernels.visible_patches import contrast_mean


@dataclass
class View:
    """One group of crops as the student sees them: random pixels, the recipe's share of coloured crops.

    crops: uint8 [N, H, W, C]; index: int32 [N, n]; order: int32 [N, 4]; factors: float32 [N, 4].
    """

    crops: Tensor
    index: Tensor
    order: Tensor
    factors: Tensor

    @property
    def with_contrast(self) -> int:
        """Crops whose mean gray is wanted."""
        return int((self.order == 1).any(1).sum())

    def gray_mean(self) -> Tensor:
        """float32 [N], what contrast blends with."""
        with backend.use("reference"):
            return contrast_mean(self.crops, self.order, self.factors)


def make_view(point: Point, view: str, who: str = "student") -> View:
    """The student's colours (docs/method.md section 2.2) on the patches that `who` sees."""
    draw, cfg = torch.Generator().manual_seed(0), point.cfg.views
    count, side = point.crops(view)
    crops = torch.randint(0, 256, (count, side, side, point.cfg.model.in_chans), dtype=torch.uint8, generator=draw)
    order = torch.rand(count, 4, generator=draw).argsort(1).int()
    kind = torch.arange(count) / count  # not drawn: then every number of images has the same shares
    order[kind >= cfg.student_color * (1 - cfg.student_gray)] = torch.tensor([4, -1, -1, -1], dtype=torch.int32)
    order[kind >= cfg.student_color] = -1
    spread = torch.tensor([cfg.brightness, cfg.contrast, cfg.saturation, cfg.hue])
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]) + spread * (2 * torch.rand(count, 4, generator=draw) - 1)
    device = point.device
    return View(crops.to(device), point.index(view, who), order.to(device), factors.to(device))
