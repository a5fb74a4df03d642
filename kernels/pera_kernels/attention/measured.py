"""The fastest attention for sequences of more than 32 tokens, by what was measured.

A compute capability without a row has no measurement: there xformers runs, or what follows it.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """One measurement.

    Attributes:
        fastest: name of the implementation.
        lengths: tokens of the sequences that were measured.
        source: device, dtype, heads, date, and what the others took.
    """

    fastest: str
    lengths: tuple[int, ...]
    source: str


MEASURED: dict[tuple[int, int], Row] = {
    (9, 0): Row(
        "cudnn",
        (158, 315, 471),
        "H200, torch 2.11.0+cu130, bfloat16, 12 heads of 64, 2026-11-26: forward 1.3 to 1.4 times and backward 1.5 to"
        " 1.65 times the speed of Flash-Attention 2, which xformers, varlen and sdpa run",
    ),
}


def fastest(capability: tuple[int, int]) -> str | None:
    """Name of the implementation that was measured to be the fastest on a compute capability; None: not measured."""
    row = MEASURED.get(capability)
    return None if row is None else row.fastest
