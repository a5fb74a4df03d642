"""`attention`: every implementation against the reference in float64, and what holds for all of them."""

import pytest
import torch
from torch import Tensor

from pera_kernels import backend, packing
from pera_kernels.attention import attention, sdpa
from pera_kernels.attention.reference import attention as reference

CPU = torch.device("cpu")
EPS = {torch.float64: 2**-53, torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12}
NAMES = ["sdpa", "reference", "triton", "amx", "avx512_bf16"]
# (heads, head_dim), groups: lengths around the tile's and the kernels' limits, one token, an empty group, three groups
CASES = [
    ((2, 16), [9, 8, 3, 23]),
    ((3, 8), [2, 40, 17, 8]),
    ((2, 12), [1, 1, 3, 32, 2, 33]),
    ((1, 64), [4, 9, 0, 3]),
    ((2, 20), [65, 1]),
]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm; NaN and infinity fail every bound."""
    return (got.double() - want.double()).norm().item() / (want.double().norm().item() or 1.0)


def plain(qkv: Tensor, num_heads: int, groups: list[int]) -> Tensor:
    """PyTorch's own attention, group by group: the error that a fused kernel may make."""
    out = []
    for part in packing.split(qkv, groups):
        n, length, width = part.shape
        q, k, v = part.view(n, length, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        out.append(y.transpose(1, 2).reshape(n * length, width // 3))
    return torch.cat(out)


def run(fn, qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient of qkv, for an upstream gradient that is not uniform."""
    leaf = qkv.detach().requires_grad_()
    out = fn(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, randn(*out.shape, seed=7).to(out))[0]


@pytest.fixture(params=NAMES)
def name(request):
    with backend.use(request.param):
        try:
            backend.choose("attention", CPU)
        except RuntimeError as reason:
            pytest.skip(str(reason))
        yield request.param


@pytest.mark.parametrize(("heads", "groups"), CASES)
@pytest.mark.parametrize("dtype", list(EPS))
def test_matches_float64(name, heads, groups, dtype):
    num_heads, head_dim = heads
    qkv = randn(packing.num_tokens(groups), 3 * num_heads * head_dim).to(dtype)
    exact = run(lambda x: reference(x, num_heads, groups), qkv.double())
    want = run(lambda x: plain(x, num_heads, groups), qkv)
    got = run(lambda x: attention(x, num_heads, groups), qkv)
    for a, b, c in zip(got, want, exact, strict=True):
        assert a.dtype == dtype
        assert error(a, c) <= 3 * error(b, c) + 2 * EPS[dtype]


@pytest.mark.parametrize("dtype", list(EPS))
def test_log_sum_exps(name, dtype):
    groups, num_heads = [3, 8, 2, 23, 1, 40], 2
    qkv = randn(packing.num_tokens(groups), 3 * 32).to(dtype)
    lse = torch.ops.pera.attention(qkv, num_heads, groups)[1]
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = []
    for part in packing.split(qkv.double(), groups):
        q, k, _ = part.view(*part.shape[:2], 3, num_heads, 16).permute(2, 0, 3, 1, 4)
        want.append((q @ k.mT / 4).logsumexp(-1).transpose(1, 2).flatten(0, 1))
    # Products of half numbers are exact in float32; PyTorch's fused kernel rounds its probabilities before it adds.
    assert error(lse, torch.cat(want)) <= (2e-4 if dtype.itemsize == 2 else 4 * EPS[dtype])


@pytest.mark.parametrize("length", [0, 1000])
@pytest.mark.parametrize("dtype", list(EPS))
def test_both_cpu_paths(monkeypatch, length, dtype):
    """The fused kernel and the formula, whichever the table prefers for a group."""
    monkeypatch.setattr(sdpa, "FORMULA_LENGTH", length)
    groups, num_heads = [5, 8, 2, 23], 3
    qkv = randn(packing.num_tokens(groups), 3 * 48).to(dtype)
    exact = run(lambda x: reference(x, num_heads, groups), qkv.double())
    want = run(lambda x: plain(x, num_heads, groups), qkv)
    with backend.use("sdpa"):
        got = run(lambda x: attention(x, num_heads, groups), qkv)
    for a, b, c in zip(got, want, exact, strict=True):
        assert error(a, c) <= 3 * error(b, c) + 2 * EPS[dtype]


def test_sequences_do_not_see_each_other(name):
    groups, num_heads = [3, 8, 2, 23, 2, 40], 2
    qkv = randn(packing.num_tokens(groups), 3 * 32).float()
    upstream = randn(qkv.shape[0], 32, seed=1).float()
    for first, length in ((8, 8), (24 + 23, 23), (24 + 46, 40)):  # one sequence of each group
        rows = slice(first, first + length)
        leaf = qkv.clone().requires_grad_()
        out = attention(leaf, num_heads, groups)
        only = torch.zeros_like(upstream)
        only[rows] = upstream[rows]
        (grad,) = torch.autograd.grad(out, leaf, only)
        assert (grad != 0).any(1).nonzero().flatten().tolist() == list(range(first, first + length))
        moved = qkv.clone()
        moved[rows] += 1
        changed = (attention(moved, num_heads, groups) != out).any(1)
        assert changed.nonzero().flatten().tolist() == list(range(first, first + length))


def test_every_element_is_written(name, monkeypatch):
    """New memory full of NaN: what a kernel leaves out, or reads without having written it, shows."""
    groups, num_heads = [9, 8, 3, 23, 1, 40], 2
    qkv = randn(packing.num_tokens(groups), 3 * 32).float()
    want = run(lambda x: attention(x, num_heads, groups), qkv)

    def poisoned(make):
        def filled(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return filled

    with monkeypatch.context() as patch:
        for owner, attribute in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patch.setattr(owner, attribute, poisoned(getattr(owner, attribute)))
        got = run(lambda x: attention(x, num_heads, groups), qkv)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_repeats_give_the_same_bits(name):
    groups = [33, 8, 5, 23, 2, 50]
    qkv = randn(packing.num_tokens(groups), 3 * 32).bfloat16()
    first, second = (run(lambda x: attention(x, 2, groups), qkv) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_strided_projections_and_gradients(name):
    groups = [3, 8, 2, 23]
    wide = randn(70, 2 * 96).float()
    want = run(lambda x: attention(x, 2, groups), wide[:, ::2].contiguous())
    leaf = wide[:, ::2].detach().requires_grad_()
    out = attention(leaf, 2, groups)
    upstream = randn(70, 32, seed=7).float().t().contiguous().t()
    (grad,) = torch.autograd.grad(out, leaf, upstream)
    assert torch.equal(out, want[0])
    assert torch.equal(grad, want[1])


def test_a_triton_program_writes_its_own_rows_only():
    """Programs run in any order on a GPU: the rows behind a tile's whole sequences are the next tile's."""
    with backend.use("triton"):
        reason = backend.needs_triton(CPU)
    if reason is not None:
        pytest.skip(reason)
    from pera_kernels.attention import triton

    qkv, nan = randn(5 * 23, 96).float(), float("nan")
    out, lse, grad_qkv = torch.full((115, 32), nan), torch.full((115, 2), nan), torch.full((115, 96), nan)
    ((_, _, args, constants),) = triton._launches(2, 16, [5, 23], qkv.dtype)
    first_tile, own = (2,), triton.BLOCK // 23 * 23
    triton.attention_fwd_kernel[first_tile](qkv, out, lse, *args, **constants)
    triton.attention_bwd_kernel[first_tile](out.nan_to_num(), qkv, lse.nan_to_num(), grad_qkv, *args, **constants)
    for written in (out, lse, grad_qkv):
        assert not written[:own].isnan().any()
        assert written[own:].isnan().all()


@pytest.mark.parametrize("groups", [[], [0, 8], [0, 8, 3, 0], [2, 0, 0, 40]])
def test_no_tokens(name, groups):
    leaf = torch.empty(0, 96, requires_grad=True)
    out = attention(leaf, 2, groups)
    assert out.shape == (0, 32)
    assert torch.autograd.grad(out.sum(), leaf)[0].shape == (0, 96)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(name, dtype):
    qkv = randn(3 * 8 + 40, 96).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.pera.attention, (qkv, 2, [3, 8, 1, 40]))
