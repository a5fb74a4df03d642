"""Launches, bytes and FLOPs of ops on a GPU, as each op states them beside its definition.

    @cost.of("pera::gelu")
    def _(result, x):
        return [cost.Cost(bytes=cost.size(x, result))]

The function gets the op's result and its arguments, tensors whose values it does not read, and returns what the
implementation on a GPU launches. ``pera_fast.profile.work`` adds the statements of a step up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["products", "gelu products", "attention", "cudnn attention", "passes", "exchange"]


@dataclass(frozen=True)
class Cost:
    """Launches that do one kind of work.

    Attributes:
        launches: of kernels, and of copies and memsets on the device.
        bytes: read and written, those that stay in a cache from one launch to the next not left out.
        flops: of matrix products, multiply-adds as 2.
        kind: what bounds it: products (by a library, or by a kernel that goes on with a GELU), attention
            (Flash-Attention 2 or cuDNN), passes over memory, or the exchange with other GPUs.
        dtype: of the products' operands.
    """

    launches: int = 1
    bytes: int = 0
    flops: float = 0.0
    kind: Kind = "passes"
    dtype: torch.dtype = torch.bfloat16


Statement = Callable[..., Iterable[Cost]]
_statements: dict[str, Statement] = {}
_opened: set[str] = set()


def of(*ops: str) -> Callable[[Statement], Statement]:
    """Decorate the statement of one or more ops, named as ``pera::gelu``."""

    def keep(function: Statement) -> Statement:
        _statements.update(dict.fromkeys(ops, function))
        return function

    return keep


def opened(*ops: str) -> None:
    """State of ops that they cost what they call: PyTorch's operators, other ops, kernels that read what they get."""
    _opened.update(ops)


def is_opened(op: str) -> bool:
    """Whether an op said so."""
    return op in _opened


def stated(op: str) -> Statement | None:
    """The statement of an op, None where it has none."""
    return _statements.get(op)


def size(*tensors: Any) -> int:
    """Bytes of tensors; elements that several places of a tensor share count once, None and others not at all."""
    total = 0
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            count = tensor.element_size()
            for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
                count *= length if stride else min(length, 1)
            total += count
        elif isinstance(tensor, (list, tuple)):
            total += size(*tensor)
    return total


def passes(moved: int, groups: Sequence[int]) -> list[Cost]:
    """Cost of a pass over packed tokens (``packing``), one launch for two groups, that moves so many bytes in all."""
    tokens = [n * length for n, length in zip(groups[::2], groups[1::2], strict=True)]
    launches = sum(1 for i in range(0, len(tokens), 2) if sum(tokens[i : i + 2]))
    return [Cost(launches, moved)] if launches else []


def product(m: int, n: int, k: int, dtype: torch.dtype, out_size: int, batch: int = 1) -> list[Cost]:
    """Cost of a matrix product [m, k] x [k, n] by cuBLAS, whose results have out_size bytes each.

    One with few results and a long sum is split along the sum, and one more launch adds the parts up. One of more tiles
    than a GPU has multiprocessors takes them from a counter, which a memset clears.
    """
    if not m * n * k * batch:
        return []
    moved = batch * (dtype.itemsize * (m * k + k * n) + out_size * m * n)
    if min(m, n) < NARROW:
        return [Cost(1, moved, dtype=dtype)]
    items = [Cost(1, moved, 2.0 * batch * m * n * k, "products", dtype)]
    if k >= LONG_SUM and batch * m * n <= FEW_RESULTS:
        items.append(Cost(1, 2 * 4 * batch * m * n))
    elif dtype.itemsize <= 2 and batch * -(-m // TILE) * -(-n // TILE) > MULTIPROCESSORS:
        items.append(Cost(1))
    return items


def attention(
    pairs: int, dim: int, dtype: torch.dtype, moved: int, backward_of: int | None = None, kind: Kind = "attention"
) -> list[Cost]:
    """Cost of attention by cuDNN or Flash-Attention 2.

    Args:
        pairs: of queries and keys, over sequences and heads.
        dim: of a head.
        dtype: of the queries.
        moved: bytes of arguments and results.
        backward_of: elements of the queries whose gradient is taken; None: forward.
        kind: which of the two it is.
    """
    if not pairs:
        return []
    if backward_of is None:
        return [Cost(1, moved, 4.0 * pairs * dim, kind, dtype)]
    single, half = 4 * backward_of, dtype.itemsize * backward_of
    return [
        Cost(1, moved, 10.0 * pairs * dim, kind, dtype),  # five products: the scores are made again
        Cost(1, 2 * half),  # sums of grad * out
        Cost(2, 2 * single + half),  # clears the queries' gradient in float32, converts it
    ]


# As cuBLAS did on an H200: kernels and memsets of a step of vit_b16 (bench/results/gpu, fce4329 and 2d9b0ae).
LONG_SUM, FEW_RESULTS = 8192, 3 * 2**20
TILE, MULTIPROCESSORS = 192, 132
NARROW = 8  # a product with fewer rows or columns is a pass over the other operand
