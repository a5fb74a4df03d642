"""Ops on tensors of more than 2^31 elements, where a 32-bit offset would wrap; on a CPU the same tests on small ones.

The first and the last sequence hold numbers, all between them zeros; what comes out of the two is what the definition
makes of them alone.
"""

from contextlib import nullcontext

import pytest
import torch
from packed_support import EPS, error, needs_memory, randn
from torch import Tensor

from pera_kernels import backend, packing
from pera_kernels.add_norm import add_norm
from pera_kernels.add_norm.reference import add_norm as add_norm_definition
from pera_kernels.attention import attention
from pera_kernels.attention.reference import attention as attention_definition
from pera_kernels.gelu import gelu_, gelu_backward_
from pera_kernels.linear_gelu import linear_gelu
from pera_kernels.sequence_add import sequence_add
from pera_kernels.sequence_add.reference import sequence_add as add_definition
from pera_kernels.sequence_norm import sequence_norm
from pera_kernels.sequence_norm.reference import sequence_norm as norm_definition

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
HALF = torch.bfloat16
BOUND = 6 * EPS[HALF]
DIM, LENGTH = 1024, 64
SMALL, KEEP = [2, LENGTH], torch.tensor([1, 0], dtype=torch.int32)


@pytest.fixture(
    params=[pytest.param(("cpu", 1 << 18), id="cpu"), pytest.param(("cuda", 1 << 31), marks=GPU, id="cuda")]
)
def size(request: pytest.FixtureRequest) -> tuple[str, int]:
    """Device, and elements that a tensor has more than."""
    needs_memory(24, request.param[0])
    return request.param


def ends(x: Tensor) -> Tensor:
    """Tokens of the first and the last sequence of x [T, DIM], float64 on the CPU."""
    return torch.cat([x[:LENGTH], x[-LENGTH:]]).double().cpu()


def stream(device: str, elements: int) -> tuple[Tensor, list[int], Tensor]:
    """x [T, DIM], its groups, and a subset: the last sequence, then the first."""
    n = elements // (DIM * LENGTH) + 1
    x = torch.zeros(n * LENGTH, DIM, dtype=HALF, device=device)
    x[:LENGTH], x[-LENGTH:] = (randn(LENGTH, DIM, seed=seed).to(x) for seed in (1, 2))
    assert x.numel() > elements
    return x.requires_grad_(), [n, LENGTH], torch.tensor([n - 1, 0], dtype=torch.int32, device=device)


def small(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in float64 on the CPU, of a stream its ends."""
    made = {k: ends(v.detach()) if k == "x" else v.detach().double().cpu() for k, v in tensors.items()}
    return {k: v.requires_grad_() for k, v in made.items()}


def same(got: Tensor, want: Tensor, what: str) -> None:
    """The ends of a stream, which is zero between them, or a whole tensor."""
    if got.shape != want.shape:
        assert not got[LENGTH:-LENGTH].any(), what
        got = ends(got)
    assert error(got.cpu(), want) <= BOUND, what


def vectors(device: str, *names: str) -> dict[str, Tensor]:
    return {name: randn(DIM, seed=5 + i).float().to(device).requires_grad_() for i, name in enumerate(names)}


def branch(device: str, n: int) -> Tensor:
    """Two sequences that are added n / 2 times, in sum as large as the stream."""
    return (randn(2 * LENGTH, DIM, seed=3) / n).to(device, HALF).requires_grad_()


def test_sequence_norm(size: tuple[str, int]) -> None:
    x, groups, keep = stream(*size)
    tensors = {"x": x, **vectors(size[0], "weight", "bias")}
    out = sequence_norm(*tensors.values(), 1e-6, groups, keep, [2])
    upstream = randn(2 * LENGTH, DIM, seed=4)
    got = torch.autograd.grad(out, list(tensors.values()), upstream.to(out))
    alone = small(tensors)
    want = norm_definition(*alone.values(), 1e-6, KEEP, SMALL, [2])
    same(out, want, "out")
    for name, a, b in zip(tensors, got, torch.autograd.grad(want, list(alone.values()), upstream), strict=True):
        same(a, b, name)


def test_sequence_add(size: tuple[str, int]) -> None:
    x, groups, keep = stream(*size)
    tensors = {"x": x, "y": branch(size[0], groups[0])}
    out = sequence_add(*tensors.values(), groups, keep, [2])
    got = torch.autograd.grad(out, list(tensors.values()), out.detach())
    alone = small(tensors)
    want = add_definition(alone["x"], alone["y"] * (groups[0] / 2), KEEP, SMALL, [2])
    same(out, want, "out")
    wanted = torch.autograd.grad(want, list(alone.values()), want.detach())
    for name, a, b in zip(tensors, got, wanted, strict=True):
        same(a, b, name)


def test_add_norm(size: tuple[str, int]) -> None:
    x, groups, keep = stream(*size)
    tensors = {"x": x, "y": branch(size[0], groups[0]), **vectors(size[0], "y_bias", "weight", "bias")}
    with torch.no_grad():
        tensors["y_bias"] /= groups[0]
    subset = packing.with_places(keep, groups, [2])
    sums, normed = add_norm(*tensors.values(), 1e-6, groups, subset, [2], subset, [2])[:2]
    upstream = randn(2 * LENGTH, DIM, seed=4)
    got = torch.autograd.grad((sums, normed), list(tensors.values()), (sums.detach(), upstream.to(normed)))
    alone = small(tensors)
    more = groups[0] / 2
    scaled = alone["x"], alone["y"] * more, alone["y_bias"] * more, alone["weight"], alone["bias"]
    want = add_norm_definition(*scaled, 1e-6, SMALL, KEEP, [2], KEEP, [2])
    same(sums, want[0], "sum")
    same(normed, want[1], "normed")
    wanted = torch.autograd.grad(want, list(alone.values()), (want[0].detach(), upstream))
    for name, a, b in zip(tensors, got, wanted, strict=True):
        same(a, b, name)


def test_gelu(size: tuple[str, int]) -> None:
    device, elements = size
    width = DIM * LENGTH
    x = torch.zeros(elements // width + 1, width, dtype=HALF, device=device)
    x[0], x[-1] = (randn(width, seed=seed).to(x) for seed in (1, 2))
    upstream = torch.zeros_like(x)
    upstream[0], upstream[-1] = (randn(width, seed=seed).to(x) for seed in (3, 4))
    few = torch.stack([x[0], x[-1]]).double().cpu().requires_grad_()
    want = torch.nn.functional.gelu(few)
    (wanted,) = torch.autograd.grad(want, few, torch.stack([upstream[0], upstream[-1]]).double().cpu())
    _, sums = gelu_backward_(upstream, x)
    out = gelu_(x)
    for got, expected in ((out, want), (upstream, wanted)):
        assert not got[1:-1].any()
        assert error(torch.stack([got[0], got[-1]]).cpu(), expected) <= BOUND
    assert error(sums.cpu(), wanted.sum(0)) <= BOUND


def test_linear_gelu(size: tuple[str, int]) -> None:
    device, elements = size
    depth = 64
    x = torch.zeros(elements // DIM + 1, depth, dtype=HALF, device=device)
    x[-1] = randn(depth, seed=1).to(x)
    weight, bias = randn(DIM, depth, seed=2).to(x), torch.zeros(DIM, dtype=HALF, device=device)
    own = device == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
    with backend.use("triton") if own else nullcontext():  # else as a product and a GELU
        act, hidden = linear_gelu(x, weight, bias, True)
    wanted = x[-1].double() @ weight.double().t()
    assert not hidden[:-1].any()
    assert not act[:-1].any()
    assert error(hidden[-1], wanted) <= BOUND
    assert error(act[-1], torch.nn.functional.gelu(wanted)) <= BOUND


@pytest.mark.parametrize("length", [8, 23])
def test_attention(size: tuple[str, int], length: int) -> None:
    device, elements = size
    width = 64
    n = elements // (3 * width * length) + 1
    qkv = torch.zeros(n * length, 3 * width, dtype=HALF, device=device)
    qkv[-length:] = randn(length, 3 * width, seed=1).to(qkv)
    last = qkv[-length:].double().requires_grad_()
    with backend.use("triton" if device == "cuda" else "reference"):
        out = attention(qkv.requires_grad_(), 1, [n, length])
        (grad,) = torch.autograd.grad(out, qkv, out.detach())
    want = attention_definition(last, 1, [1, length])
    (wanted,) = torch.autograd.grad(want, last, want.detach())
    for got, expected in ((out, want), (grad, wanted)):
        assert not got[:-length].any()
        assert error(got[-length:], expected) <= 2 * BOUND
