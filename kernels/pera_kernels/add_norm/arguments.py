"""Arguments of `add_norm`, for code below the op."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Subsets(NamedTuple):
    """Sequences of a packed stream that the branch before saw, and those that the next one sees."""

    groups: Sequence[int]  # [n0, len0, n1, len1, ...]
    add_subset: Tensor | None = None  # int32 [sum(add_counts) + sum(n)], with places; None: all
    add_counts: Sequence[int] = ()
    norm_subset: Tensor | None = None  # likewise
    norm_counts: Sequence[int] = ()


def kept(subset: Tensor | None, kept_counts: Sequence[int]) -> Tensor | None:
    """The kept sequence numbers of a subset with places."""
    return None if subset is None else subset[: sum(kept_counts)]


class Norm(NamedTuple):
    """The LayerNorm of the next branch; no weight: there is none."""

    weight: Tensor | None  # [D]
    bias: Tensor | None  # [D]
    eps: float
