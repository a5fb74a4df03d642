"""Native attention on the CPU: both engines against the formula in float64, and what their tiles could get wrong."""

import pytest
import torch
from implementations import each_on_cpu
from packed_support import error, randn
from torch import Tensor

from pera_kernels import backend, packing
from pera_kernels.attention import attention, native
from pera_kernels.attention.reference import attention as reference
from pera_kernels.isa import Isa, at_most
from pera_kernels.query_attention import query_attention
from pera_kernels.query_attention.reference import query_attention as query_reference

BF16 = torch.bfloat16
# Around the 32 rows of a block and the 8 blocks of keys whose products are added up at once; groups in one call.
LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 63, 65, 255, 256, 257, 289, 520]
engine = each_on_cpu("attention", ("amx", "avx512_bf16"))


def module(name: str) -> native.Native:
    return {"amx": native.amx, "avx512_bf16": native.avx512_bf16}[name]


def run(fn, x: Tensor) -> tuple[Tensor, Tensor]:
    """Result and gradient of x."""
    leaf = x.detach().requires_grad_()
    out = fn(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, randn(*out.shape, seed=7).to(out))[0]


def agree(qkv: Tensor, num_heads: int, groups: list[int], factor: float = 2.0) -> None:
    """Operands of both products are rounded, probabilities included: a few roundings of bfloat16."""
    exact = run(lambda x: reference(x, num_heads, groups), qkv.double())
    got = run(lambda x: attention(x, num_heads, groups), qkv)
    dim = qkv.shape[1] // 3
    parts = zip((got[0], *got[1].split(dim, 1)), (exact[0], *exact[1].split(dim, 1)), strict=True)
    for name, (a, b) in zip(("out", "q", "k", "v"), parts, strict=True):
        assert a.dtype == BF16
        # A sequence of one token has no gradient of its scores: what rounding leaves is small beside that of v.
        scale = max(b.norm().item(), 1e-2 * exact[1].norm().item())
        assert (a.double() - b).norm().item() <= factor * 2**-9 * scale, name


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_lengths(engine: str, head_dim: int) -> None:
    groups = [x for length in LENGTHS for x in (2, length)]
    agree(randn(packing.num_tokens(groups), 3 * 3 * head_dim).to(BF16), 3, groups)


def test_each_length_by_itself(engine: str) -> None:
    for length in LENGTHS:
        agree(randn(2 * length, 3 * 64, seed=length).to(BF16), 1, [2, length], factor=3.0)


@pytest.mark.parametrize(("queries", "keys"), [(1, 40), (33, 20), (40, 300), (70, 1)])
def test_other_queries_than_keys(engine: str, queries: int, keys: int) -> None:
    if engine != "amx":
        pytest.skip("query_attention runs on AMX alone")
    if queries > keys:  # the op asks for tokens of the sequence; the kernels take any number
        q, k, v = (randn(2, 3, n, 64, seed=n).to(BF16) for n in (queries, keys, keys + 1))
        v = v[:, :, :keys]
        out, lse = module(engine).forward_group(q, k, v)
        scores = q.double() @ k.double().mT / 8
        assert error(out, scores.softmax(-1) @ v.double()) <= 2 * 2**-9
        assert error(lse, scores.logsumexp(-1)) <= 1e-5
        return
    q, kv = randn(3 * queries, 64).to(BF16), randn(3 * keys, 128, seed=1).to(BF16)
    given = 2, [queries], [3, keys]
    with torch.no_grad():
        out, lse = query_attention(q, kv, *given)
    exact = query_reference(q.double(), kv.double(), *given)
    assert error(out, exact) <= 2 * 2**-9
    leaves, wide = [[t.requires_grad_() for t in pair] for pair in ((q, kv), (q.double(), kv.double()))]
    upstream = randn(*out.shape, seed=3)
    got = torch.autograd.grad(query_attention(*leaves, *given)[0], leaves, upstream.to(BF16))
    want = torch.autograd.grad(query_reference(*wide, *given), wide, upstream.to(BF16).double())
    for a, b in zip(got, want, strict=True):
        assert error(a, b) <= 3 * 2**-9


def test_peaked_scores(engine: str) -> None:
    """One key has nearly all the weight."""
    agree(8 * randn(70, 3 * 64).to(BF16), 1, [1, 70], factor=6.0)


def test_shifted_scores(engine: str) -> None:
    """Scores of about 300: the sums stay in range, and gradients are as near as those of PyTorch's fused attention.

    The rounding of the result, of which both take the sums of grad * out, moves all gradients of a query's scores.
    """
    qkv = randn(70, 3 * 64).to(BF16)
    qkv[:, :128] += 6
    exact = run(lambda x: reference(x, 1, [1, 70]), qkv.double())
    got = run(lambda x: attention(x, 1, [1, 70]), qkv)
    with backend.use("sdpa"):
        fused = run(lambda x: attention(x, 1, [1, 70]), qkv)
    for a, b, c in zip(got, fused, exact, strict=True):
        assert error(a, c) <= 1.2 * error(b, c) + 2**-9
    assert attention(torch.full((40, 3 * 32), 100.0, dtype=BF16), 1, [1, 40]).eq(100).all()


def test_scores_far_below_zero(engine: str) -> None:
    """Rows of zeros that fill up a block have higher scores than all keys."""
    qkv = randn(40, 3 * 64).to(BF16)
    qkv[:, :64] += 6
    qkv[:, 64:128] -= 6
    exact = run(lambda x: reference(x, 1, [1, 40]), qkv.double())
    got = run(lambda x: attention(x, 1, [1, 40]), qkv)
    assert all(error(a, b) <= 2**-3 for a, b in zip(got, exact, strict=True))


def test_log_sum_exps(engine: str) -> None:
    qkv = 3 * randn(5 * 45, 3 * 64).to(BF16)
    lse = torch.ops.pera.attention(qkv, 2, [5, 45])[1]
    q, k, _ = qkv.double().view(5, 45, 3, 2, 32).permute(2, 0, 3, 1, 4)
    want = (q @ k.mT * 32**-0.5).logsumexp(-1).transpose(1, 2).flatten(0, 1)
    assert error(lse, want) <= 1e-6


def test_numbers_that_are_none_stay_in_their_sequence(engine: str) -> None:
    groups = [3, 40]
    qkv = randn(120, 3 * 64).to(BF16)
    want = run(lambda x: attention(x, 2, groups), qkv)
    qkv[45] = torch.nan
    qkv[50] = torch.inf
    got = run(lambda x: attention(x, 2, groups), qkv)
    for a, b in zip(got, want, strict=True):
        assert a[40:80].isnan().any(1).all()
        assert torch.equal(a[:40], b[:40])
        assert torch.equal(a[80:], b[80:])


def test_nothing_else_is_written(engine: str) -> None:
    """Results into the middle of larger tensors, with rows of other strides than the arguments'."""
    run_on = module(engine)
    n, heads, length, dim = 2, 3, 37, 32
    q, k, v, grad = (randn(n, heads, length, dim, seed=i).to(BF16) for i in range(4))
    out, lse = run_on.forward_group(q, k, v)
    wide = [torch.full((n, length + 2, heads + 1, dim + 32), 7.0, dtype=BF16) for _ in range(4)]
    sums = torch.full((n, heads + 1, length + 2), 7.0)
    inner = [w[:, 1:-1, 1:, 16:-16].transpose(1, 2) for w in wide]
    torch.ops.pera_native.attention(q, k, v, inner[0], sums[:, 1:, 1:-1], run_on.needed == Isa.AMX)
    assert torch.equal(inner[0], out)
    assert torch.equal(sums[:, 1:, 1:-1], lse)
    torch.ops.pera_native.attention_backward(grad, q, k, v, out, lse, *inner[1:], run_on.needed == Isa.AMX)
    for a, b in zip(inner[1:], run_on.backward_group(grad, q, k, v, out, lse), strict=True):
        assert torch.equal(a, b)
    for view in [*inner, sums[:, 1:, 1:-1]]:
        view.fill_(7)
    assert all(x.eq(7).all() for x in [*wide, sums])


def test_bits_do_not_depend_on_threads(engine: str) -> None:
    groups, before = [3, 50, 5, 8], torch.get_num_threads()
    qkv = randn(packing.num_tokens(groups), 3 * 64).to(BF16)
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run(lambda x: attention(x, 2, groups), qkv))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_both_engines_agree() -> None:
    cpu = torch.device("cpu")
    for name in ("amx", "avx512_bf16"):
        with backend.use(name):
            if reason := module(name).available(cpu):
                pytest.skip(reason)
    groups = [2, 300]
    qkv = randn(600, 3 * 64).to(BF16)
    results = []
    for name in ("amx", "avx512_bf16"):
        with backend.use(name):
            results.append(run(lambda x: attention(x, 1, groups), qkv))
    for a, b in zip(*results, strict=True):
        assert error(a, b) <= 2**-9


def test_what_they_do_not_take_goes_elsewhere(engine: str) -> None:
    for dtype, width in ((torch.float32, 32), (torch.float16, 32), (torch.float64, 32), (BF16, 40)):
        qkv = randn(20, 3 * width).to(dtype)
        assert module(engine).why_not(qkv, 1)
        got = attention(qkv, 1, [2, 10])
        assert error(got, reference(qkv.double(), 1, [2, 10])) <= 3e-3


@pytest.mark.parametrize("name", ["amx", "avx512_bf16"])
def test_other_processors_say_why_not(name: str) -> None:
    with at_most(Isa.AVX512):
        reason = module(name).available(torch.device("cpu"))
        assert reason is not None
        with backend.use(name), pytest.raises(RuntimeError, match=f"attention: the {name} implementation was asked"):
            backend.choose("attention", torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 1, 4, 32)}, "q must be bfloat16"),
        ({"k": torch.zeros(2, 1, 4, 64, dtype=BF16)[..., ::2]}, "k must be bfloat16 .* contiguous rows"),
        ({"v": torch.zeros(2, 1, 5, 32, dtype=BF16)}, r"v \[2, 1, 5, 32\] does not fit"),
        ({"lse": torch.zeros(2, 1, 5)}, "lse must be float32"),
        ({"lse": torch.zeros(2, 1, 4, dtype=torch.float64)}, "lse must be float32"),
        ({name: torch.zeros(2, 1, 4, 40, dtype=BF16) for name in "qkvo"}, "a multiple of 32 values, got 40"),
    ],
)
def test_wrong_arguments(engine: str, change: dict[str, Tensor], message: str) -> None:
    given = {name: torch.zeros(2, 1, 4, 32, dtype=BF16) for name in "qkvo"} | {"lse": torch.zeros(2, 1, 4)} | change
    with pytest.raises(ValueError, match=message):
        torch.ops.pera_native.attention(*given.values(), False)
