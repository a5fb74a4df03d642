"""Sinkhorn centering as a center vector against the plain, dense algorithm."""

import pytest
import torch
from torch import Tensor

from pera_kernels.distillation_loss import reference, sinkhorn_center, weight_norm


def dense_sinkhorn(logits: Tensor, temp: float, iterations: int) -> Tensor:
    """The field's standard form (SwAV, DINOv2): assignments [N, K] of logits [N, K]."""
    q = torch.exp(logits / temp).t()
    k, n = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / k
        q = q / q.sum(0, keepdim=True) / n
    return (q * n).t()


def make(n: int, k: int, d: int, dtype=torch.float64):
    gen = torch.Generator().manual_seed(n + k)
    rows = torch.nn.functional.normalize(torch.randn(n, d, generator=gen, dtype=torch.float64))
    return (
        rows.to(dtype),
        torch.randn(k, d, generator=gen, dtype=torch.float64),
        torch.rand(k, 1, generator=gen, dtype=torch.float64) + 0.5,
    )


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(weight_norm, "MIN_CHUNK", 64)
    monkeypatch.setattr(weight_norm, "CHUNK_ELEMENTS", 64)


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize(("n", "k"), [(1, 64), (12, 201), (30, 7)])
def test_softmax_with_center_is_the_assignment(n, k, iterations):
    rows, v, g = make(n, k, 6)
    logits = rows @ reference.effective_prototypes(v, g).t()
    center = sinkhorn_center(rows, v, g, 0.05, iterations)
    assert center.shape == (k,)
    assert center.dtype == torch.float64
    torch.testing.assert_close(((logits - center) / 0.05).softmax(1), dense_sinkhorn(logits, 0.05, iterations))


def test_balances_prototypes():
    rows, v, g = make(64, 8, 5)
    logits = rows @ reference.effective_prototypes(v, g).t()
    use = ((logits - sinkhorn_center(rows, v, g, 0.05, 200)) / 0.05).softmax(1).mean(0)
    torch.testing.assert_close(use, torch.full_like(use, 1 / 8), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_rows(dtype):
    rows, v, g = make(9, 150, 16, dtype)
    center = sinkhorn_center(rows, v.float(), g.float(), 0.05)
    assert center.dtype == torch.float32
    exact = sinkhorn_center(rows.double(), v, g, 0.05)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert (center - exact).abs().max() <= tolerance * exact.abs().max()


def test_extreme_logits_stay_finite():
    rows, v, g = make(5, 90, 4, torch.float32)
    assert sinkhorn_center(rows, v, 1e4 * g, 0.03).isfinite().all()


def test_takes_no_gradient_and_repeats():
    rows, v, g = make(5, 90, 4)
    v.requires_grad_()
    center = sinkhorn_center(rows, v, g, 0.05)
    assert not center.requires_grad
    assert torch.equal(center, sinkhorn_center(rows, v, g, 0.05))


def test_bad_arguments_are_named():
    rows, v, g = make(5, 90, 4)
    with pytest.raises(ValueError, match="rows must be"):
        sinkhorn_center(rows[:0], v, g, 0.05)
    with pytest.raises(ValueError, match="iterations"):
        sinkhorn_center(rows, v, g, 0.05, 0)
