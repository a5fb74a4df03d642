"""Pictures of a network's input: the coloured view of a crop, with the patches that are visible."""

import numpy as np
import torch
from torch import Tensor

from pera_fast.model.inputs import GroupInputs
from pera_kernels.visible_patches import contrast_mean, visible_patches

STUDENT, TEACHER, PREDICTED = "#d1495b", "#2e6f95", "#edae49"
HIDDEN = 0.94  # gray of what a network does not see


def colored_view(group: GroupInputs, who: str, patch: int, rgb: list[int] | None = None) -> np.ndarray:
    """A network's coloured view of every crop, all patches shown: float [N, H, W, C] in [0, 1].

    Args:
        group: the crops.
        who: "student" or "teacher".
        patch: pixels a side of a patch.
        rgb: channels that are red, green and blue, as the kernels take it.
    """
    order, factors = getattr(group, f"{who}_order"), getattr(group, f"{who}_factors")
    n, size, _, channels = group.crops.shape
    grid = size // patch
    index = torch.arange(grid * grid, dtype=torch.int32).repeat(n, 1)
    gray = contrast_mean(group.crops, order, factors, rgb)
    plain = [0.0] * channels, [1.0] * channels
    rows = visible_patches(group.crops, index, order, factors, gray, *plain, patch, torch.float32, rgb)
    return unpatch(rows.view(n, grid * grid, channels, patch, patch).permute(0, 1, 3, 4, 2), grid).numpy()


def unpatch(patches: Tensor, grid: int) -> Tensor:
    """[N, L, p, p, C] -> [N, grid * p, grid * p, C]."""
    n, _, p, _, channels = patches.shape
    return patches.reshape(n, grid, grid, p, p, channels).transpose(2, 3).reshape(n, grid * p, grid * p, channels)


def keep_only(view: np.ndarray, index: np.ndarray, patch: int) -> np.ndarray:
    """The view with everything but some patches grayed out."""
    out = np.full_like(view, HIDDEN)
    columns = view.shape[1] // patch
    for number in index:
        y, x = divmod(int(number), columns)
        at = np.s_[y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
        out[at] = view[at]
    return out
