"""Sinkhorn centering as a center vector, which the loss takes as it is. Not part of the published method."""

import math

import torch
from torch import Tensor

from ..products import product_dtype
from .weight_norm import accumulation_dtype, check_prototypes, chunk_size, chunks


@torch.no_grad()
def sinkhorn_center(rows: Tensor, v: Tensor, g: Tensor, teacher_temp: float | Tensor, iterations: int = 3) -> Tensor:
    """The center with which the softmax of the teacher's logits is their Sinkhorn assignment.

    Sinkhorn-Knopp makes ``Q[k, n] = u_k exp(z_nk / T) v_n``, alternately with sums of 1/K over samples (u) and of 1/N
    over prototypes (v); the assignment of sample n is its column times N. The column's scale falls away in a softmax,
    so ``softmax((z_n - c) / T)`` is that assignment when ``c_k = -T log u_k``. Log space; each iteration is one pass
    over chunks of prototypes: u of a chunk from all v, then that chunk's share of the next v. Never [N, K].

    Args:
        rows: [N, d] teacher bottleneck rows of all crops that are balanced together, N >= 1, any float dtype.
        v: [K, d].
        g: [K, 1].
        teacher_temp: T > 0, a number or a [] tensor.
        iterations: at least 1; the field uses 3.

    Returns:
        center [K] float32 (float64 for float64 rows), for the same rows and temperature only.

    Raises:
        ValueError: no rows, no iterations, or shapes that do not fit together.
    """
    check_prototypes(v, g, "")
    if rows.ndim != 2 or rows.shape[1] != v.shape[1] or rows.shape[0] < 1:
        raise ValueError(f"rows must be [N, {v.shape[1]}] with N >= 1, got {list(rows.shape)}")
    if iterations < 1 or not teacher_temp > 0:
        raise ValueError(f"need iterations >= 1 and teacher_temp > 0, got {iterations} and {teacher_temp}")
    n, k = rows.shape[0], v.shape[0]
    dtype = accumulation_dtype(rows.dtype)
    products = product_dtype(rows.dtype, rows.device)
    x = rows.to(products)
    size = chunk_size(n, k)
    log_u = torch.empty(k, dtype=dtype, device=rows.device)
    log_v = torch.zeros(n, dtype=dtype, device=rows.device)
    for _ in range(iterations):
        columns = torch.full_like(log_v, -torch.inf)  # running log of sum over prototypes of u_k exp(z_nk / T)
        for chunk in chunks(v, g, size, products, dtype):
            z = torch.mm(x, chunk.direction.t()).to(dtype).mul_(chunk.scale / teacher_temp)  # [N, c]
            log_u[chunk.rows] = -math.log(k) - torch.logsumexp(z + log_v[:, None], 0)
            columns = torch.logaddexp(columns, torch.logsumexp(z.add_(log_u[chunk.rows]), 1))
        log_v = -math.log(n) - columns
    return log_u.mul_(-teacher_temp)
