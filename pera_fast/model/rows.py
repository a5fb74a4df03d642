"""Selects the rows of packed tokens that the losses read: each sequence's cls token and its predicted tokens.

``tails`` says how many last tokens of a sequence of each group are read: those of the predicted patches in the
student's global group, none elsewhere.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pera_kernels.packing import num_tokens, pairs, split


def row_groups(groups: Sequence[int], tails: Sequence[int]) -> list[int]:
    """The groups of the rows that are read: [n0, 1 + tail0, n1, 1 + tail1, ...]."""
    return [x for (n, _), tail in zip(pairs(groups), tails, strict=True) for x in (n, 1 + tail)]


def _matching(x: Tensor, rows: Tensor, groups: Sequence[int], tails: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of x [T, D] and of its rows that belong together: the cls tokens, then the last ones, of each group."""
    for part, target, tail in zip(split(x, groups), split(rows, row_groups(groups, tails)), tails, strict=True):
        if part.shape[0] and part.shape[1]:
            yield part[:, 0], target[:, 0]
            if tail:
                yield part[:, part.shape[1] - tail :], target[:, 1:]


def take_rows(x: Tensor, groups: Sequence[int], tails: Sequence[int]) -> Tensor:
    """The rows of packed tokens x [T, D] that are read: [sum(n * (1 + tail)), D]."""
    rows = x.new_empty(num_tokens(row_groups(groups, tails)), x.shape[1])
    for source, target in _matching(x, rows, groups, tails):
        target.copy_(source)
    return rows


def add_to_rows_(x: Tensor, rows: Tensor, groups: Sequence[int], tails: Sequence[int]) -> None:
    """Add rows to those rows of x [T, D], in place."""
    for target, source in _matching(x, rows, groups, tails):
        target.add_(source)


def rows_gradient(grad: Tensor, groups: Sequence[int], tails: Sequence[int]) -> Tensor:
    """Gradient [T, D] of the packed tokens from that of the rows that were taken: zero elsewhere."""
    x = grad.new_zeros(num_tokens(groups), grad.shape[1])
    for target, source in _matching(x, grad, groups, tails):
        target.copy_(source)
    return x


class _SplitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, groups):
        ctx.groups = groups
        parts = [part for part in split(rows, groups) if part.numel()]
        first = split(rows, groups)[0]
        cls = torch.cat([part[:, 0] for part in parts]) if parts else rows.new_empty(0, rows.shape[1])
        return cls, first[:, 1:].reshape(-1, rows.shape[1])

    @staticmethod
    def backward(ctx, grad_cls, grad_last):
        grad = grad_cls.new_empty(num_tokens(ctx.groups), grad_cls.shape[1])
        done = 0
        for i, part in enumerate(split(grad, ctx.groups)):
            if part.numel():
                part[:, 0] = grad_cls[done : done + part.shape[0]]
                done += part.shape[0]
            if i == 0 and part.shape[1] > 1:
                part[:, 1:] = grad_last.view(part.shape[0], -1, grad.shape[1])
        return grad, None


def split_rows(rows: Tensor, groups: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Split taken rows into cls rows [N, D] of all groups and the last tokens [n0 * tail, D] of the first group.

    Args:
        rows: as ``take_rows`` gives them.
        groups: as ``row_groups`` gives them; groups other than the first have no last tokens.
    """
    return _SplitRows.apply(rows, list(groups))
