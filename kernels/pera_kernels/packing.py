"""Packed token groups: sequences of several lengths in one [T, D] tensor without padding.

``groups`` is a flat list ``[n0, len0, n1, len1, ...]``: n0 sequences of len0 tokens, then n1 sequences of len1 tokens,
and so on, each sequence's tokens next to each other. ``keep`` names a subset of the sequences for stochastic depth: the
kept sequence numbers of group 0, then those of group 1 ..., each counted within its group; ``kept_counts`` says how
many of each.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

HALF_OR_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of a stream that the fast implementations take; float64 runs in PyTorch."""


def pairs(groups: Sequence[int]) -> list[tuple[int, int]]:
    """[n0, len0, n1, len1] -> [(n0, len0), (n1, len1)]."""
    if len(groups) % 2:
        raise ValueError(f"groups holds pairs (sequences, length), got {len(groups)} numbers: {list(groups)}")
    return [(groups[i], groups[i + 1]) for i in range(0, len(groups), 2)]


def num_tokens(groups: Sequence[int]) -> int:
    """Tokens of all groups together."""
    return sum(n * length for n, length in pairs(groups))


def kept_groups(groups: Sequence[int], kept_counts: Sequence[int] | None) -> list[int]:
    """The groups that remain when ``kept_counts[i]`` sequences of group i are kept (None: all)."""
    if kept_counts is None:
        return list(groups)
    return [x for (_, length), k in zip(pairs(groups), kept_counts, strict=True) for x in (k, length)]


def split(x: Tensor, groups: Sequence[int]) -> list[Tensor]:
    """Views [n, len, D] of each group of packed tokens x [T, D]."""
    parts = x.split([n * length for n, length in pairs(groups)])
    return [part.view(n, length, *x.shape[1:]) for part, (n, length) in zip(parts, pairs(groups), strict=True)]


def check(x: Tensor, keep: Tensor | None, groups: Sequence[int], kept_counts: Sequence[int]) -> None:
    """Raise ValueError if x [T, D], keep and the group sizes do not fit together."""
    if x.shape[0] != num_tokens(groups):
        raise ValueError(f"x has {x.shape[0]} rows, groups {list(groups)} hold {num_tokens(groups)} tokens")
    if keep is not None and (len(kept_counts) != len(pairs(groups)) or keep.numel() != sum(kept_counts)):
        raise ValueError(
            f"keep has {keep.numel()} entries, kept_counts is {list(kept_counts)} for {len(pairs(groups))} groups"
        )


def kept_parts(
    x: Tensor, keep: Tensor, groups: Sequence[int], kept_counts: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each group: its view [n, len, D] and the kept sequence numbers [k]."""
    return zip(split(x, groups), keep.split(list(kept_counts)), strict=True)


def with_places(keep: Tensor, groups: Sequence[int], kept_counts: Sequence[int]) -> Tensor:
    """Append to a subset of the sequences each sequence's place in it: the form in which ``add_norm`` takes a subset.

    Args:
        keep: int32 [..., sum(kept_counts)], kept sequence numbers of each group, without repetition.
        groups, kept_counts: see above.

    Returns:
        int32 [..., sum(kept_counts) + sum(n)]: keep, then for every sequence its place among the kept ones of its
        group, or -1 if it is not kept.
    """
    return torch.cat([keep, places(keep, [n for n, _ in pairs(groups)], kept_counts)], dim=-1)


def places(keep: Tensor, sequences: Sequence[int], kept_counts: Sequence[int]) -> Tensor:
    """Each sequence's place among the kept ones of its group, -1 if it is not kept: int32 [..., sum(sequences)].

    Args:
        keep: int32 [..., sum(kept_counts)], kept sequence numbers of each group, without repetition.
        sequences: sequences of each group.
        kept_counts: kept ones of each group.
    """
    found = []
    for part, n in zip(keep.split(list(kept_counts), dim=-1), sequences, strict=True):
        place = torch.full((*keep.shape[:-1], n), -1, dtype=torch.int32, device=keep.device)
        numbers = torch.arange(part.shape[-1], dtype=torch.int32, device=keep.device)
        found.append(place.scatter_(-1, part.long(), numbers.expand(part.shape)))
    return torch.cat(found, dim=-1)


def gather(x: Tensor, keep: Tensor | None, groups: Sequence[int], kept_counts: Sequence[int]) -> Tensor:
    """The kept sequences of x [T, D], packed: [sum(kept_counts[i] * len[i]), D]. All of x (no copy) if keep is None."""
    if keep is None:
        return x
    return torch.cat([part.index_select(0, k).flatten(0, 1) for part, k in kept_parts(x, keep, groups, kept_counts)])
