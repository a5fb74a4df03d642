"""Predicts a step's time on a card from its work: each launch takes as long as its FLOPs or its bytes.

Each class of work reaches a share of the card's rates, the same on every card. The shares are those of an H200. They
stay as they are until a GPU measures them again: better kernels show as fewer launches, bytes and FLOPs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pera_fast.config import Config
from pera_fast.profile.count import HOPPER
from pera_fast.profile.on_gpu import GPU
from pera_fast.profile.work import Row, Work
from pera_fast.train.cards import CARDS, Card
from pera_fast.train.flops import flops_per_image
from pera_fast.train.graph import choose_graph


@dataclass(frozen=True)
class Efficiency:
    """Shares of a card's rates, and what a launch takes at least.

    Attributes:
        products: of the rate of matrix products, in bf16 or fp16 by cuBLAS.
        fp8_products: of the rate of products in e4m3.
        gelu_products: as products, of the Triton kernel that goes on with a GELU.
        attention: of the rate of matrix products, Flash-Attention 2.
        cudnn_attention: likewise, cuDNN's attention.
        passes: of the memory's bandwidth.
        launch: seconds that a kernel takes at least, with the gap before it; a memset takes none.
        host: seconds that the host takes for a launch without a CUDA graph.
    """

    products: float
    fp8_products: float
    gelu_products: float
    attention: float
    cudnn_attention: float
    passes: float
    launch: float
    host: float

    def share(self, row: Row) -> float:
        """Share of the matrix rate that a row with FLOPs reaches."""
        if row.kind == "products":
            return self.fp8_products if row.dtype.startswith("float8") else self.products
        return {
            "gelu products": self.gelu_products,
            "attention": self.attention,
            "cudnn attention": self.cudnn_attention,
        }[row.kind]


# An H200 and commit 2d9b0ae (bench/results/gpu/2-h200-2d9b0ae*): products (35.9 ms) and cuDNN's attention (7.32 ms)
# from the kernels of a step at batch 64; passes and launch from two steps, 19.5 ms at batch 16, 246.1 at batch 256.
# From fce4329 (1-h200-fce4329*): Flash-Attention 2 (10.69 ms at batch 64), and host from 101.5 ms at batch 16 without a
# graph. What neither ran was timed alone on an H200 beside what it stands for: products in e4m3, and linear_gelu
# (bench/results/gpu/linear_gelu). tests/profile/test_predict.py computes all of them again.
MEASURED = Efficiency(
    products=0.684, fp8_products=0.554, gelu_products=0.506, attention=0.166, cudnn_attention=0.224, passes=0.627,
    launch=3.06e-6, host=35.9e-6,
)  # fmt: skip


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
    seconds = row.bytes / (efficiency.passes * card.bandwidth)
    if row.flops:
        rate = card.rate(row.dtype)
        if rate is None:
            return None
        seconds = max(seconds, row.flops / (efficiency.share(row) * rate))
    return max(seconds, row.launches * efficiency.launch) if row.bytes else 0.0


def step_seconds(work: Work, card: Card, graph: bool, efficiency: Efficiency = MEASURED) -> float | None:
    """Seconds of a step; without a CUDA graph the host's launches may take longer than the GPU's work."""
    gpu = gpu_seconds(work, card, efficiency)
    if gpu is None or graph:
        return gpu
    return max(gpu, work.total("launches") * efficiency.host)


def predictions(hopper: Work, others: Work, cfg: Config, world_size: int = 1) -> dict[str, dict[str, float]]:
    """The prediction for each card that can run the step: {name: {ms, images_per_s, mfu}}.

    Args:
        hopper: work of one GPU of compute capability 9.0.
        others: work of one of any other.
        cfg: resolved configuration; its batch is that of one GPU.
        world_size: GPUs that train together; images/s are of all.
    """
    images, graph = cfg.train.resolve_batch(1).total, choose_graph(cfg, GPU).use
    dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(cfg.train.precision, "float32")
    found = {}
    for card in CARDS:
        work = hopper if card.capability == HOPPER else others
        seconds, rate = step_seconds(work, card, graph), card.rate(dtype)
        if seconds is None or rate is None:
            continue
        mfu = images / seconds * flops_per_image(cfg) / rate
        found[card.name] = asdict(Prediction(seconds * 1e3, world_size * images / seconds, mfu))
    return found
