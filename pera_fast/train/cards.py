"""Rates of GPUs from their makers' data sheets: for a step's MFU, and for the prediction of its time.

Sources, NVIDIA: A100 80GB data sheet (June 2021), H100 data sheet (SXM5, 2023), H200 data sheet (SXM, 2024), HGX B200
(SXM, 2025), L40S data sheet (2023), Ada GPU architecture whitepaper v2.1 (RTX 4090). Matrix rates are dense, with
float32 accumulation; float32 is without TensorFloat-32, which the trainer does not turn on.
"""

from __future__ import annotations

from dataclasses import dataclass

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Card:
    """Rates of a GPU.

    Attributes:
        name: as users call it.
        device: regular expression for the name that torch gives the device.
        capability: compute capability, which chooses among kernels.
        memory: bytes on the box.
        bandwidth: of the memory, bytes/s.
        half, fp8, single: FLOP/s of matrix products in bf16 or fp16, e4m3 (None: it has no such products), float32.
        link: bytes/s to other GPUs in one direction: NVLink, or PCIe 4.0 x16.
    """

    name: str
    device: str
    capability: tuple[int, int]
    memory: float
    bandwidth: float
    half: float
    fp8: float | None
    single: float
    link: float

    def rate(self, dtype: str) -> float | None:
        """FLOP/s of matrix products of operands of that dtype; None: it has none."""
        if dtype in ("bfloat16", "float16"):
            return self.half
        return self.fp8 if dtype.startswith("float8") else self.single


CARDS = (
    Card("A100", "A100", (8, 0), 80 * GIGA, 2.039 * TERA, 312 * TERA, None, 19.5 * TERA, 300 * GIGA),
    Card("H100", "H100 80GB HBM3", (9, 0), 80 * GIGA, 3.35 * TERA, 989.4 * TERA, 1978.9 * TERA, 67 * TERA, 450 * GIGA),
    Card("H200", "H200(?! NVL)", (9, 0), 141 * GIGA, 4.8 * TERA, 989.4 * TERA, 1978.9 * TERA, 67 * TERA, 450 * GIGA),
    Card("B200", r"\bB200", (10, 0), 180 * GIGA, 8 * TERA, 2250 * TERA, 4500 * TERA, 75 * TERA, 900 * GIGA),
    Card("L40S", "L40S", (8, 9), 48 * GIGA, 0.864 * TERA, 362 * TERA, 733 * TERA, 91.6 * TERA, 32 * GIGA),
    Card("RTX 4090", "RTX 4090$", (8, 9), 24 * GIGA, 1.008 * TERA, 165.2 * TERA, 330.3 * TERA, 82.6 * TERA, 32 * GIGA),
)


def card(name: str) -> Card:
    """The card of that name."""
    return next(one for one in CARDS if one.name == name)
