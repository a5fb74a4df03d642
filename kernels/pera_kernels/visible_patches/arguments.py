"""A named tuple of the arguments that `visible_patches` and `pixel_loss` share, for code below the ops."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Patches(NamedTuple):
    """Patches of crops, with their colours and normalisation: see `op.visible_patches`.

    Attributes:
        crops: uint8 or uint16 [N, H, W, C], or float [N, C, H, W].
        index: int32 or int64 [N, n].
        order: int32 or int64 [N, 4]; None: no colour.
        factors: float [N, 4]; None as `order` is.
        gray_mean: float [N]; None: not known yet, or no colour.
        mean, std: a float for each channel.
        patch_size: P.
        rgb: numbers of the red, green and blue channel; see `op`.
    """

    crops: Tensor
    index: Tensor
    order: Tensor | None
    factors: Tensor | None
    gray_mean: Tensor | None
    mean: Sequence[float]
    std: Sequence[float]
    patch_size: int
    rgb: Sequence[int] | None = None
