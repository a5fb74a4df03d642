"""`sequence_norm`: LayerNorm of what a branch sees, with and without stochastic depth."""

import torch

from pera_bench.point import Point
from pera_bench.work import BOTH, FORWARD, Cost, Work
from pera_kernels.packing import kept_groups, num_tokens
from pera_kernels.sequence_norm import reference, sequence_norm

IMPLEMENTATIONS = "sequence_norm"
CASES = {"subset": (FORWARD, BOTH), "all": (FORWARD, BOTH)}


def make(point: Point, case: str) -> Work:
    """Each kept row read and written once; back, its gradient and itself read, the stream's gradient written."""
    groups = point.groups("student_late")
    keep, kept_counts = point.keep(groups) if case == "subset" else (None, [])
    x = point.normal(num_tokens(groups), point.dim)
    weight, bias = (point.normal(point.dim, dtype=torch.float32, seed=seed) for seed in (1, 2))
    rows = num_tokens(kept_groups(groups, None if keep is None else kept_counts)) * point.dim * x.element_size()
    return Work(
        op="sequence_norm",
        call=sequence_norm,
        reference=lambda x, weight, bias, eps, groups, keep, kept_counts: reference.sequence_norm(
            x, weight, bias, eps, keep, groups, kept_counts
        ),
        arguments=(x, weight, bias, 1e-6, groups, keep, kept_counts),
        learned=(0, 1, 2),
        forward=Cost(moved=2 * rows),
        backward=Cost(moved=2 * rows + x.nbytes),
    )
