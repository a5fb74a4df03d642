"""The fastest attention, by what was measured: on GPUs for sequences of more than 32 tokens, on CPUs for all.

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

SHORT = (
    "H200, torch 2.11.0+cu130, bfloat16, 2026-11-26: a step of batch 64 took 100.8 ms, with varlen for all lengths"
    " 102.2, with sdpa 139.4"
)
"""Source of the Triton kernels' choice for short sequences."""

AMX = Row(
    "amx",
    (8, 23, 158, 315, 471),
    "Intel Xeon, torch 2.13.0+cpu, bfloat16, 12 heads of 64, one thread, 2026-11-27: forward 1.5 to 2.2 times and"
    " backward 2.2 to 4.7 times the speed of sdpa",
)
"""On a CPU with AMX."""


def fastest(capability: tuple[int, int]) -> str | None:
    """Name of the implementation that was measured to be the fastest on a compute capability; None: not measured."""
    row = MEASURED.get(capability)
    return None if row is None else row.fastest
