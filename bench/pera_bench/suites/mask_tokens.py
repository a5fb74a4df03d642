"""`mask_tokens`: the student's global sequences grow by their predicted patches."""

import torch

from pera_bench.point import Point, nbytes
from pera_bench.work import BOTH, FORWARD, Cost, Work
from pera_kernels.mask_tokens import mask_tokens, reference

IMPLEMENTATIONS = "mask_tokens"
CASES = {"global": (FORWARD, BOTH)}


def make(point: Point, case: str) -> Work:
    """Tokens and position rows read, grown sequences written; back, those read, two gradients written."""
    index, dim = point.index(case, "predicted"), point.dim
    tokens = point.normal(index.shape[0] * (1 + point.seen(case, "student")), dim)
    mask_token = point.normal(dim, dtype=torch.float32, seed=1)
    pos = point.normal(1 + point.patches(case), dim, dtype=torch.float32, seed=2)
    grown = nbytes(tokens) + index.numel() * dim * tokens.element_size()
    return Work(
        op="mask_tokens",
        call=mask_tokens,
        reference=reference.mask_tokens,
        arguments=(tokens, mask_token, pos, index),
        learned=(0, 1, 2),
        forward=Cost(moved=nbytes(tokens) + index.numel() * dim * pos.element_size() + grown),
        backward=Cost(moved=grown + nbytes(tokens, pos)),
    )
