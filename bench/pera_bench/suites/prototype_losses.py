"""`prototype_losses`: the distillation loss of all rows with KoLeo of the global crops', as a step calls them."""

import torch
from torch import Tensor

from pera_bench.point import Point
from pera_bench.suites import distillation_loss, koleo
from pera_bench.work import BOTH, FORWARD, Work
from pera_kernels.prototype_losses import prototype_losses, reference

IMPLEMENTATIONS = "prototype_losses"
CASES = {"all": (FORWARD, BOTH)}


def together(losses: tuple[Tensor, Tensor]) -> Tensor:
    """Entropies [N] and KoLeo [] as one tensor [N + 1]."""
    return torch.cat([losses[0], losses[1].unsqueeze(0)])


def make(point: Point, case: str) -> Work:
    """The cost of the two ops; that it can do with less is what it is for."""
    distillation, spread = distillation_loss.make(point, "all"), koleo.make(point, "global")
    num_crops = point.cfg.views.num_global
    return Work(
        op="prototype_losses",
        call=lambda *arguments: together(prototype_losses(*arguments)),
        reference=lambda *arguments: together(reference.prototype_losses(*arguments)),
        arguments=(*distillation.arguments, point.images * num_crops, num_crops),
        learned=(0, 1, 2),
        forward=distillation.forward + spread.forward,
        backward=distillation.backward + spread.backward,
    )
