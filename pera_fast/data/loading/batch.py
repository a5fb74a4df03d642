"""A batch of the loader: crops, and the colour parameters of their two views."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass
class ColorParams:
    """Colour operations of one view of N crops (docs/method.md section 2.2); drawn here, applied by the kernels.

    Op codes: 0 brightness, 1 contrast, 2 saturation, 3 hue, 4 grayscale, -1 nothing.
    """

    order: Tensor  # int32 [N, 4]: op codes, applied from left to right
    factors: Tensor  # float32 [N, 4]: factor of op codes 0..3 at the index of the op code; unused: 1, 1, 1, 0


@dataclass
class CropGroup:
    """All global or all local crops of a batch; a pair's student and teacher view share one crop."""

    pixels: (
        Tensor  # uint8 or uint16 [num_crops * B, H, W, C], crop-major: all images' crop 0, then all images' crop 1, ...
    )
    student: ColorParams
    teacher: ColorParams


@dataclass
class Batch:
    """One micro-batch of one rank."""

    micro_step: int  # position in the run, counts micro-batches from 0
    epoch: int
    samples: np.ndarray  # int64 [B]: manifest row whose draws fill each slot (a substitute appears with its own row)
    global_: CropGroup
    local: CropGroup
