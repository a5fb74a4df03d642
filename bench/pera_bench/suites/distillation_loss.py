"""`distillation_loss`: rows of all crops against the prototypes of both networks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pera_bench.point import Point
from pera_bench.work import BOTH, FORWARD, Cost, Work
from pera_kernels.distillation_loss import distillation_loss, reference

IMPLEMENTATIONS = "distillation_loss"
CASES = {"all": (FORWARD, BOTH)}


def unit_rows(point: Point, count: int, seed: int) -> Tensor:
    """[count, bottleneck] as the heads give them, in the activations' dtype."""
    rows = point.normal(count, point.cfg.model.bottleneck, dtype=torch.float32, seed=seed)
    return F.normalize(rows).to(point.dtype)


def prototypes(point: Point, seed: int) -> tuple[Tensor, Tensor]:
    """Weight-norm directions and magnitudes, float32 [K, bottleneck] and [K, 1]."""
    m = point.cfg.model
    v = 0.05 * point.normal(m.prototypes, m.bottleneck, dtype=torch.float32, seed=seed)
    return v, torch.ones(m.prototypes, 1, device=point.device)


def make(point: Point, case: str) -> Work:
    """Both networks' prototypes read forward and again backward, where the student's gradient is written."""
    m, v = point.cfg.model, point.cfg.views
    count = point.images * (v.num_global + v.num_local)
    networks = [t for seed in (0, 2) for t in (unit_rows(point, count, seed), *prototypes(point, seed + 1))]
    center = 0.01 * point.normal(m.prototypes, dtype=torch.float32, seed=4)
    matrix = networks[1].nbytes
    products = count * m.prototypes * m.bottleneck
    return Work(
        op="distillation_loss",
        call=distillation_loss,
        reference=reference.distillation_loss,
        arguments=(*networks, center, 0.1, 0.04),
        learned=(0, 1, 2),
        forward=Cost(2 * matrix, 4 * products),
        backward=Cost(3 * matrix, 8 * products),
    )
