"""`attention` on a GPU: every implementation against the reference in float64, in a training step's shapes."""

import pytest
import torch
from torch import Tensor

from pera_kernels import backend, packing
from pera_kernels.attention import attention, cudnn, measured, op, xformers
from pera_kernels.attention.op import attention_backward_with_sums, attention_with_lse
from pera_kernels.attention.reference import attention as reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NAMES = ["triton", "cudnn", "xformers", "varlen", "sdpa", "reference"]
EPS = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12}
# heads, head_dim, groups: a teacher's and a student's step of two images; odd ones
CASES = [
    (12, 64, [4, 471, 16, 23]),
    (12, 64, [4, 158, 11, 8]),
    (6, 32, [3, 315, 13, 8, 5, 23]),
    (2, 64, [1, 1, 0, 9, 7, 32, 2, 33]),
    (3, 40, [5, 8, 2, 100]),
]


def run(fn, qkv: Tensor) -> tuple[Tensor, Tensor]:
    leaf = qkv.detach().requires_grad_()
    out = fn(leaf)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return out.detach(), torch.autograd.grad(out, leaf, upstream.to(out))[0]


def error(got: Tensor, want: Tensor) -> float:
    return (got.double() - want.double()).norm().item() / want.double().norm().item()


def plain(qkv: Tensor, num_heads: int, groups: list[int]) -> Tensor:
    out = []
    for part in packing.split(qkv, groups):
        n, length, width = part.shape
        if n == 0:  # PyTorch's fused attention gives NaN for the others' gradients then
            out.append(part.new_empty(0, width // 3))
            continue
        q, k, v = part.view(n, length, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        out.append(y.transpose(1, 2).reshape(n * length, width // 3))
    return torch.cat(out)


def make_qkv(case, dtype: torch.dtype) -> Tensor:
    heads, head_dim, groups = case
    shape = packing.num_tokens(groups), 3 * heads * head_dim
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to("cuda", dtype)


@pytest.fixture(params=NAMES)
def name(request):
    with backend.use(request.param):
        try:
            backend.choose("attention", torch.device("cuda", 0))
        except RuntimeError as reason:
            pytest.skip(str(reason))
        yield request.param


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", list(EPS))
def test_matches_float64(name, case, dtype):
    heads, _, groups = case
    qkv = make_qkv(case, dtype)
    exact = run(lambda x: reference(x, heads, groups), qkv.double())
    want = run(lambda x: plain(x, heads, groups), qkv)
    got = run(lambda x: attention(x, heads, groups), qkv)
    for a, b, c in zip(got, want, exact, strict=True):
        assert error(a, c) <= 3 * error(b, c) + 2 * EPS[dtype]


def in_rows(lse: Tensor, qkv: Tensor, heads: int, groups: list[int]) -> Tensor:
    """The log-sum-exps as [T, H]: cuDNN's implementation leaves those of a group as [n, H, len]."""
    parts = []
    for module, rows, part in op._runs(qkv, heads, groups):
        for x in packing.split(lse[rows], part):
            n, length, _ = x.shape
            x = x.reshape(n, heads, length).transpose(1, 2) if module is cudnn else x
            parts.append(x.reshape(n * length, heads))
    return torch.cat(parts)


def test_log_sum_exps(name):
    heads, _, groups = case = CASES[0]
    qkv = make_qkv(case, torch.bfloat16)
    got = in_rows(torch.ops.pera.attention(qkv, heads, groups)[1], qkv, heads, groups)
    with backend.use("reference"):
        want = torch.ops.pera.attention(qkv.double(), heads, groups)[1]
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    assert error(got, want) < 1e-4


def test_a_warm_call_does_not_wait_for_the_host(name):
    heads, _, groups = case = CASES[1]
    qkv = make_qkv(case, torch.bfloat16)
    upstream = torch.randn(qkv.shape[0], qkv.shape[1] // 3, device="cuda").bfloat16()
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            leaf = qkv.detach().requires_grad_()
            torch.autograd.grad(attention(leaf, heads, groups), leaf, upstream)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_repeats_give_the_same_bits():
    """The default, with deterministic algorithms asked for."""
    heads, _, groups = case = CASES[0]
    qkv = make_qkv(case, torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(lambda x: attention(x, heads, groups), qkv) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_triton_repeats_give_the_same_bits():
    groups = [33, 8, 17, 23]
    qkv = make_qkv((12, 64, groups), torch.bfloat16)
    with backend.use("triton"):
        first, second = (run(lambda x: attention(x, 12, groups), qkv) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_default_is_what_was_measured_else_xformers(monkeypatch):
    pytest.importorskip("xformers")
    monkeypatch.setenv("PERA_SHORT_ATTENTION", "0")
    device = torch.device("cuda", 0)
    reason = xformers.available(device)
    if reason is not None:
        pytest.skip(reason)
    fastest = measured.fastest(torch.cuda.get_device_capability(device))
    assert backend.choose("attention", device) == (fastest or "xformers")


@pytest.mark.parametrize("case", CASES[:2])
def test_gradient_with_column_sums(name, case):
    heads, _, groups = case
    qkv = make_qkv(case, torch.bfloat16)
    out, lse = attention_with_lse(qkv, heads, groups)
    grad_qkv, sums = attention_backward_with_sums(torch.randn_like(out), qkv, out, lse, heads, groups)
    assert error(sums, grad_qkv.double().sum(0)) < 1e-5


def test_a_graph_replays(name):
    heads, _, groups = case = CASES[0]
    qkv = make_qkv(case, torch.bfloat16)
    upstream = torch.randn(qkv.shape[0], qkv.shape[1] // 3, device="cuda").bfloat16()

    def both() -> tuple[Tensor, Tensor]:
        out, lse = attention_with_lse(qkv, heads, groups)
        return out, attention_backward_with_sums(upstream, qkv, out, lse, heads, groups)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        want = both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        got = both()
    qkv.mul_(0.5)
    graph.replay()
    qkv.mul_(2)
    graph.replay()
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 1e-2  # some add up the gradient of the queries in any order
