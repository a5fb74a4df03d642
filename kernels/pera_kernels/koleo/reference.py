"""The definition of KoLeo on prototype logits in plain PyTorch, with the logits in memory.

Source: docs/method.md section 5.3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pera_kernels.distillation_loss.reference import effective_prototypes

EPS = 1e-8


def nearest_neighbour_entropy(points: Tensor) -> Tensor:
    """-mean log(||p_i - p_nn(i) + eps|| + eps), p = points / max(||points||, eps), nn by the largest dot product.

    Args:
        points: [B, m], B >= 1, float32 or float64. A single point is its own neighbour.

    Returns:
        scalar; the choice of neighbour carries no gradient, the neighbour itself does.
    """
    points = F.normalize(points, dim=1, eps=EPS)
    with torch.no_grad():
        neighbour = (points @ points.t()).fill_diagonal_(-torch.inf).argmax(1)
    return -((points - points[neighbour] + EPS).norm(dim=1) + EPS).log().mean()


def koleo(rows: Tensor, v: Tensor, g: Tensor, num_crops: int) -> Tensor:
    """KoLeo of the prototype logits of each crop, summed over crops.

    Args:
        rows: [num_crops * B, d]; the product with the prototypes runs in their dtype.
        v: [K, d].
        g: [K, 1].
        num_crops: number of global crops, of equally many rows, in order.

    Returns:
        scalar float32 (float64 for float64 rows).
    """
    logits = rows @ effective_prototypes(v, g).to(rows.dtype).t()
    logits = logits.to(torch.promote_types(rows.dtype, torch.float32))
    return torch.stack([nearest_neighbour_entropy(part) for part in logits.chunk(num_crops)]).sum()
