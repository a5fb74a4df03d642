"""Named tuples of what the implementations of attention take and return, for code below the op."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Packed(NamedTuple):
    """Projections of packed sequences."""

    qkv: Tensor  # [T, 3 * D]: queries, keys, values, each as heads x head_dim
    num_heads: int
    groups: Sequence[int]  # [n0, len0, n1, len1, ...]


class Attended(NamedTuple):
    """Results of the forward that the backward reads."""

    out: Tensor  # [T, D]
    lse: Tensor  # [T, H] float32, log-sum-exps of the scores
