"""Predict a step's time on a card from its work: a launch takes as long as its FLOPs or its bytes, whichever is more.

A class of work reaches a share of the card's rates, the same on every card. The shares are those of an H200. They stay
as they are until a GPU measures them again: better kernels show as fewer launches, bytes and FLOPs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pera_fast.config import Config
from pera_fast.profile.cards import CARDS, Card
from pera_fast.profile.on_gpu import GPU
from pera_fast.profile.work import Row, Work
from pera_fast.train.flops import flops_per_image
from pera_fast.train.graph import choose_graph


@dataclass(frozen=True)
class Efficiency:
    """Shares of a card's rates, and what a launch takes besides its work.

    Attributes:
        products, attention: of the rate of matrix products.
        passes: of the memory's bandwidth.
        gap: seconds from the end of a kernel to the beginning of the next one.
        host: seconds that the host takes for a launch without a CUDA graph.
    """

    products: float
    attention: float
    passes: float
    gap: float
    host: float


# An H200 and commit fce4329 (bench/results/gpu/1-h200-fce4329*): products (37.3 ms) and attention (10.69 ms) from the
# kernels of a step at batch 64; passes and gap from two steps, 33.9 ms at batch 16 with a CUDA graph and 330.3 ms at
# batch 256; host from 101.5 ms at batch 16 without a graph. tests/profile/test_predict.py computes them again.
MEASURED = Efficiency(products=0.702, attention=0.166, passes=0.573, gap=3.52e-6, host=35.9e-6)


@dataclass(frozen=True)
class Prediction:
    """A step on a card: milliseconds, images/s, and FLOPs of the method over the peak's (``pera_fast.train.flops``)."""

    ms: float
    images_per_s: float
    mfu: float


def gpu_seconds(work: Work, card: Card, efficiency: Efficiency) -> float | None:
    """Seconds for which the GPU computes; None: the card has no products in such a dtype."""
    total = 0.0
    for row, times in work.rows.items():
        seconds = _seconds(row, card, efficiency)
        if seconds is None:
            return None
        total += times * seconds
    return total


def _seconds(row: Row, card: Card, efficiency: Efficiency) -> float | None:
    if row.kind == "exchange":
        return row.bytes / card.link
    memory = row.bytes / (efficiency.passes * card.bandwidth)
    if not row.flops:
        return memory
    rate = card.rate(row.dtype)
    if rate is None:
        return None
    share = efficiency.attention if row.kind == "attention" else efficiency.products
    return max(memory, row.flops / (share * rate))


def step_seconds(work: Work, card: Card, graph: bool, efficiency: Efficiency = MEASURED) -> float | None:
    """Seconds of a step; without a CUDA graph the host's launches may take longer than the GPU's work."""
    gpu = gpu_seconds(work, card, efficiency)
    if gpu is None:
        return None
    launches = work.total("launches")
    gpu += launches * efficiency.gap
    return gpu if graph else max(gpu, launches * efficiency.host)


def predictions(work: Work, cfg: Config, world_size: int = 1) -> dict[str, dict[str, float]]:
    """What ``Prediction`` holds by the name of a card, for the cards that can run such a step.

    Args:
        work: of one GPU.
        cfg: resolved configuration; its batch is that of one GPU.
        world_size: GPUs that train together; images/s are of all.
    """
    images, graph = cfg.train.resolve_batch(1).total, choose_graph(cfg, GPU).use
    dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(cfg.train.precision, "float32")
    found = {}
    for card in CARDS:
        seconds, rate = step_seconds(work, card, graph), card.rate(dtype)
        if seconds is None or rate is None:
            continue
        mfu = images / seconds * flops_per_image(cfg) / rate
        found[card.name] = asdict(Prediction(seconds * 1e3, world_size * images / seconds, mfu))
    return found
