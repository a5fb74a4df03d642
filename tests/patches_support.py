"""Arguments of `visible_patches` and `contrast_mean`, which several tests call."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class PatchArguments:
    """Arguments of the ops, under their names and in their order."""

    crops: Tensor
    index: Tensor
    order: Tensor | None
    factors: Tensor | None
    gray_mean: Tensor | None
    mean: list[float]
    std: list[float]
    patch_size: int
