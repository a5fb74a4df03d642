"""Triton functions on packed token groups: the row of the stream for a branch's row, and tiles of rows.

Two groups (global, local) share a launch; more groups are launched in pairs. Rows and sequences are counted in 32 bits,
addresses in 64.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .packing import HALF_OR_SINGLE, kept_groups, pairs

KEEP_BLOCK = 512  # kept sequences that are compared at once


@triton.jit
def stream_row(row, inside, keep_ptr, kept0, len0, n0, len1, HAS_KEEP: tl.constexpr):
    """Rows (int64) of the stream that rows of the kept sequences come from; ``inside``: which of them exist."""
    in_first = row < kept0 * len0
    local = tl.where(in_first, row, row - kept0 * len0)
    length = tl.maximum(tl.where(in_first, len0, len1), 1)  # rows beyond the last may fall into an empty group
    seq = local // length
    offset = local - seq * length
    if HAS_KEEP:
        seq = tl.load(keep_ptr + tl.where(in_first, seq, kept0 + seq), mask=inside, other=0)
    return tl.where(in_first, 0, n0 * len0) + seq.to(tl.int64) * length + offset


@triton.jit
def program_place(program, count0, len0, len1, D: tl.constexpr, BLOCK: tl.constexpr):
    """Place of a program that takes BLOCK values of one sequence; the first group has ``count0`` sequences.

    Returns: is it in the first group; number of the sequence in its group; length; first value within the sequence.
    """
    blocks0 = tl.cdiv(len0 * D, BLOCK)
    in_first = program < count0 * blocks0
    local = tl.where(in_first, program, program - count0 * blocks0)
    length = tl.where(in_first, len0, len1)
    blocks = tl.cdiv(length * D, BLOCK)
    seq = local // blocks
    return in_first, seq, length, (local - seq * blocks) * BLOCK


@triton.jit
def find_kept(seq, keep_ptr, count, BLOCK: tl.constexpr):
    """Place of a sequence among ``count`` kept ones, or -1."""
    lanes = tl.arange(0, BLOCK)
    found = tl.full((BLOCK,), -1, tl.int32)
    for start in range(0, count, BLOCK):
        i = start + lanes
        numbers = tl.load(keep_ptr + i, mask=i < count, other=-1)
        found = tl.maximum(found, tl.where(numbers == seq, i, -1))
    return tl.max(found, 0)


@dataclass(frozen=True)
class Pair:
    """Two groups of one launch.

    Attributes:
        stream, sequence, row: where the pair begins in the stream, in keep, in the branch's rows.
        n, length, kept_counts: of both groups; all 0 where there is no second one.
    """

    stream: int
    sequence: int
    row: int
    n: tuple[int, int]
    length: tuple[int, int]
    kept_counts: tuple[int, int]

    @property
    def rows(self) -> int:
        """Rows of the branch."""
        return self.kept_counts[0] * self.length[0] + self.kept_counts[1] * self.length[1]

    @property
    def tokens(self) -> int:
        """Rows of the stream."""
        return self.n[0] * self.length[0] + self.n[1] * self.length[1]

    def programs(self, counts: tuple[int, int], dim: int, block: int) -> int:
        """Programs that take ``block`` values of one sequence each, for that many sequences of either group."""
        return sum(count * -(-length * dim // block) for count, length in zip(counts, self.length, strict=True))


def group_pairs(groups: Sequence[int], kept_counts: Sequence[int] | None) -> Iterator[Pair]:
    """The launches for groups and their kept sequences (None: all)."""
    shapes, counts = pairs(groups), [n for n, _ in pairs(kept_groups(groups, kept_counts))]
    stream = sequence = row = 0
    for i in range(0, len(shapes), 2):
        (n0, len0), kept0 = shapes[i], counts[i]
        (n1, len1), kept1 = (shapes[i + 1], counts[i + 1]) if i + 1 < len(shapes) else ((0, 0), 0)
        pair = Pair(stream, sequence, row, (n0, n1), (len0, len1), (kept0, kept1))
        yield pair
        stream, sequence, row = stream + pair.tokens, sequence + kept0 + kept1, row + pair.rows


def columns(dim: int) -> int:
    """Columns of a tile that leaves no lane of a usual width idle: the largest power of two that divides it, to 256."""
    even = dim & -dim
    return min(even, 256) if even >= 64 else min(1 << (dim - 1).bit_length(), 256)


def why_not(x: Tensor) -> str | None:
    """Why the elementwise kernels cannot take a tensor, or None."""
    if x.dtype not in HALF_OR_SINGLE:
        return f"{x.dtype} runs in PyTorch only"
    return None
