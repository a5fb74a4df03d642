"""`embed_tokens`: the patch projection of the student's patches, with positions, cls and packing."""

import torch

from pera_bench.point import Point, nbytes
from pera_bench.work import BOTH, FORWARD, Cost, Work
from pera_kernels.embed_tokens import embed_tokens, reference

IMPLEMENTATIONS = "embed_tokens"
CASES = {"global": (FORWARD, BOTH), "local": (FORWARD, BOTH), "global_packing": (FORWARD, BOTH)}


def make(point: Point, case: str) -> Work:
    """Rows read and tokens written; back, the gradient and the rows read, the parameters' gradients written.

    In `global_packing` a row has one value: what is left is what stands around the product.
    """
    view, model, dim = case.removesuffix("_packing"), point.cfg.model, point.dim
    index = point.index(view, "student")
    width = 1 if case.endswith("_packing") else model.in_chans * model.patch_size**2
    rows = point.normal(index.numel(), width)
    weight = point.normal(dim, width, dtype=torch.float32, seed=1) / width**0.5
    bias, cls = (point.normal(dim, dtype=torch.float32, seed=seed) for seed in (2, 3))
    pos = point.normal(1 + point.patches(view), dim, dtype=torch.float32, seed=4)
    tokens = index.shape[0] * (1 + index.shape[1]) * dim * rows.element_size()
    flops = 2 * rows.numel() * dim
    return Work(
        op="embed_tokens",
        call=embed_tokens,
        reference=reference.embed_tokens,
        arguments=(rows, weight, bias, pos, cls, index),
        learned=(1, 2, 3, 4),
        forward=Cost(nbytes(rows) + tokens, flops),
        backward=Cost(tokens + nbytes(rows, weight, pos), flops),
    )
