"""`attention`: each implementation on the packed sequences of a step's teacher and student, forward and backward.

    pytest bench/test_attention.py --recipe vit_b16 --images 8

``triton`` runs its kernels on groups of short sequences and the best other implementation on the long ones; the
``local`` cases hold short sequences only and are what op.SHORT_SEQUENCE is to be set by.
"""

import pytest
import torch
from torch import Tensor

from pera_fast.config import Config
from pera_fast.model.inputs import num_kept
from pera_kernels import backend
from pera_kernels.attention import attention
from pera_kernels.packing import num_tokens, pairs

CASES = ("teacher", "teacher_local", "student", "student_late", "student_local")
IMPLEMENTATIONS = ("triton", "xformers", "varlen", "sdpa", "reference")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def make_groups(cfg: Config, case: str, images: int) -> list[int]:
    """The sequences that one block's attention sees; of the student's, those that stochastic depth keeps."""
    views, groups = cfg.views, []
    for crops, size in ((views.num_global, views.global_size), (views.num_local, views.local_size)):
        seen, predicted, taught = cfg.model.patch_counts((size // cfg.model.patch_size) ** 2)
        if case.endswith("_local") and crops == views.num_global and size == views.global_size:
            continue
        if case.startswith("teacher"):
            groups += [crops * images, 1 + taught]
        else:
            late = predicted if case == "student_late" and size == views.global_size else 0
            groups += [num_kept(crops * images, cfg.model.drop_path), 1 + seen + late]
    return groups


@pytest.fixture(scope="module", params=CASES)
def groups(request, cfg, images) -> list[int]:
    return make_groups(cfg, request.param, images)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, device):
    """Forces the implementation; skips with the reason where it cannot run."""
    with backend.use(request.param):
        try:
            backend.choose("attention", device)
        except RuntimeError as reason:
            pytest.skip(str(reason))
        yield request.param


def make(cfg: Config, groups: list[int], device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Projections [T, 3 * D], upstream gradients [T, D], heads."""
    draw, rows, dim = torch.Generator().manual_seed(0), num_tokens(groups), cfg.model.embed_dim
    qkv, grad = (torch.randn(rows, width, generator=draw) for width in (3 * dim, dim))
    dtype = DTYPES[cfg.train.precision]
    return qkv.to(device, dtype), grad.to(device, dtype), cfg.model.num_heads


def flops(groups: list[int], dim: int, products: int) -> int:
    """Of ``products`` matrix products [len, d] x [d, len] a head."""
    return products * 2 * dim * sum(n * length**2 for n, length in pairs(groups))


def test_forward(benchmark, measure, cfg, groups, device, implementation):
    qkv, _, heads = make(cfg, groups, device)
    with backend.use("reference"):
        expected = attention(qkv.double(), heads, groups)
    measure(lambda: attention(qkv, heads, groups), expected=expected, moved=qkv.nbytes // 3 * 4)
    report_flops(benchmark, flops(groups, cfg.model.embed_dim, 2))


def test_backward(benchmark, measure, cfg, groups, device, implementation):
    qkv, grad, heads = make(cfg, groups, device)
    op = torch.ops.pera
    with backend.use("reference"):
        exact = [t.double() for t in (grad, qkv)]
        out, lse = op.attention(exact[1], heads, groups)
        expected = op.attention_backward(*exact, out, lse, heads, groups)
    out, lse = op.attention(qkv, heads, groups)
    measure(
        lambda: op.attention_backward(grad, qkv, out, lse, heads, groups),
        expected=expected,
        moved=qkv.nbytes // 3 * 7,  # qkv and the gradient read, the gradient of qkv written
    )
    report_flops(benchmark, flops(groups, cfg.model.embed_dim, 5))


def report_flops(benchmark, count: int) -> None:
    if benchmark.stats is not None:
        benchmark.extra_info["tflop_per_s"] = count / benchmark.stats.stats.median / 1e12
