"""`add_norm`: a branch's result into the stream and the next branch's LayerNorm, with and without stochastic depth."""

import torch
from torch import Tensor

from pera_bench.point import Point
from pera_bench.work import BOTH, FORWARD, Cost, Work
from pera_kernels.add_norm import add_norm, reference
from pera_kernels.packing import kept_groups, num_tokens, with_places

IMPLEMENTATIONS = "add_norm"
CASES = {"subset": (FORWARD, BOTH), "all": (FORWARD, BOTH)}


def make(point: Point, case: str) -> Work:
    """Stream and branch read, stream and normalised rows written; back, gradients and stream read, two written."""
    groups = point.groups("student_late")
    keep, kept_counts = point.keep(groups) if case == "subset" else (None, [])
    subset = None if keep is None else with_places(keep, groups, kept_counts)
    x = point.normal(num_tokens(groups), point.dim)
    y = point.normal(num_tokens(kept_groups(groups, None if keep is None else kept_counts)), point.dim, seed=1)
    bias, weight, shift = (point.normal(point.dim, dtype=torch.float32, seed=seed) for seed in (2, 3, 4))

    def call(x: Tensor, y: Tensor, y_bias: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
        both = subset, kept_counts, subset, kept_counts
        return torch.cat(add_norm(x, y, y_bias, weight, shift, 1e-6, groups, *both)[:2])

    def definition(x: Tensor, y: Tensor, y_bias: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
        return torch.cat(
            reference.add_norm(x, y, y_bias, weight, shift, 1e-6, groups, keep, kept_counts, keep, kept_counts)
        )

    # Both results go out as one, so that they take one gradient: a pass over both that a block does not make.
    return Work(
        op="add_norm",
        call=call,
        reference=definition,
        arguments=(x, y, bias, weight, shift),
        learned=range(5),
        forward=Cost(moved=2 * x.nbytes + 2 * y.nbytes),
        backward=Cost(moved=2 * x.nbytes + 3 * y.nbytes),
    )
