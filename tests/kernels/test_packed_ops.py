"""embed_tokens, mask_tokens, sequence_norm, sequence_add and attention against their references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_support import (
    DTYPES,
    EPS,
    compare,
    error,
    implementation,  # noqa: F401 a fixture
    outputs_and_grads,
    randn,
    subset,
)
from torch import Tensor

from pera_kernels import backend, packing
from pera_kernels.attention import attention
from pera_kernels.attention.reference import attention as attention_reference
from pera_kernels.embed_tokens import embed_tokens
from pera_kernels.embed_tokens.reference import embed_tokens as embed_reference
from pera_kernels.mask_tokens import mask_tokens
from pera_kernels.mask_tokens.reference import mask_tokens as mask_reference
from pera_kernels.sequence_add import sequence_add
from pera_kernels.sequence_add.reference import sequence_add as add_reference
from pera_kernels.sequence_norm import sequence_norm
from pera_kernels.sequence_norm.reference import sequence_norm as norm_reference

GROUPS = [[3, 5, 7, 2], [1, 1], [4, 9, 0, 3], [2, 17, 5, 8, 1, 1]]


@pytest.mark.parametrize(("n_seq", "n_visible"), [(3, 5), (1, 1), (4, 9), (2, 0), (0, 4)])
@pytest.mark.usefixtures("implementation")
def test_embed_tokens(n_seq: int, n_visible: int) -> None:
    grid, dim, width = 9, 6, 12
    index = torch.stack([torch.randperm(grid)[:n_visible].sort().values for _ in range(n_seq)] or [torch.empty(0, 4)])
    index = index.view(n_seq, n_visible).int()
    tensors = {
        "rows": randn(n_seq * n_visible, width, seed=1),
        "weight": randn(dim, width, seed=2),
        "bias": randn(dim, seed=3),
        "pos": randn(1 + grid, dim, seed=4),
        "cls": randn(dim, seed=5),
    }
    names = ("weight", "bias", "pos", "cls")
    fast = lambda **t: embed_tokens(**t, index=index)  # noqa: E731
    reference = lambda **t: embed_reference(**t, index=index)  # noqa: E731
    compare(fast, reference, tensors, names, half={"rows"})


@pytest.mark.usefixtures("implementation")
def test_embed_tokens_of_groups() -> None:
    """Groups of sequences share weight, bias and cls, and each has its own position embedding."""
    sizes, dim, width = [(3, 5, 9), (0, 2, 4), (4, 1, 4)], 6, 12  # sequences, patches that are seen, patches
    index = [torch.rand(s, patches).argsort(1)[:, :n].int() for s, n, patches in sizes]
    tensors = {"weight": randn(dim, width, seed=2), "bias": randn(dim, seed=3), "cls": randn(dim, seed=5)}
    for i, (s, n, patches) in enumerate(sizes):
        tensors |= {f"rows{i}": randn(s * n, width, seed=i), f"pos{i}": randn(1 + patches, dim, seed=9 + i)}

    def grouped(function):
        def call(weight, bias, cls, **parts):
            rows, pos = ([parts[f"{name}{i}"] for i in range(3)] for name in ("rows", "pos"))
            return function(rows, weight, bias, pos, cls, index)

        return call

    names = ("weight", "bias", "cls", "pos0", "pos2")
    compare(grouped(embed_tokens), grouped(embed_reference), tensors, names, half={"rows0", "rows1", "rows2"})


@pytest.mark.parametrize("rest", [0, 7])
@pytest.mark.parametrize(("n_seq", "length", "n_new"), [(3, 4, 5), (1, 1, 1), (2, 3, 0)])
@pytest.mark.usefixtures("implementation")
def test_mask_tokens(n_seq: int, length: int, n_new: int, rest: int) -> None:
    grid, dim = 9, 6
    index = torch.stack([torch.randperm(grid)[:n_new].sort().values for _ in range(n_seq)]).int()
    tensors = {
        "tokens": randn(n_seq * length + rest, dim, seed=1),
        "mask_token": randn(dim, seed=2),
        "pos": randn(1 + grid, dim, seed=3),
    }
    fast = lambda **t: mask_tokens(**t, index=index, rest=rest)  # noqa: E731
    reference = lambda **t: mask_reference(**t, index=index, rest=rest)  # noqa: E731
    compare(fast, reference, tensors, ("tokens", "mask_token", "pos"), half={"tokens"})


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("subsets", [False, True])
@pytest.mark.usefixtures("implementation")
def test_sequence_norm(groups: list[int], subsets: bool) -> None:
    keep, kept = subset(groups, 1) if subsets else (None, [])
    dim = 8
    tensors = {
        "x": randn(packing.num_tokens(groups), dim, seed=1) * 3 + 1,
        "weight": randn(dim, seed=2),
        "bias": randn(dim, seed=3),
    }
    fast = lambda **t: sequence_norm(**t, eps=1e-6, groups=groups, keep=keep, kept_counts=kept)  # noqa: E731
    reference = lambda **t: norm_reference(**t, eps=1e-6, keep=keep, groups=groups, kept_counts=kept)  # noqa: E731
    compare(fast, reference, tensors, ("x", "weight", "bias"), half={"x"})


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("subsets", [False, True])
@pytest.mark.usefixtures("implementation")
def test_sequence_add(groups: list[int], subsets: bool) -> None:
    keep, kept = subset(groups, 2) if subsets else (None, [])
    dim = 8
    tensors = {
        "x": randn(packing.num_tokens(groups), dim, seed=1),
        "y": randn(packing.num_tokens(packing.kept_groups(groups, kept or None)), dim, seed=2),
    }
    fast = lambda **t: sequence_add(**t, groups=groups, keep=keep, kept_counts=kept)  # noqa: E731
    reference = lambda **t: add_reference(**t, keep=keep, groups=groups, kept_counts=kept)  # noqa: E731
    compare(fast, reference, tensors, ("x", "y"), half={"x", "y"})


@pytest.mark.parametrize("groups", [*GROUPS, [2, 40, 3, 7]])
@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_attention(groups: list[int], name: str) -> None:
    heads, dim = 2, 16
    tensors = {"qkv": randn(packing.num_tokens(groups), 3 * dim, seed=1)}
    with backend.use(name):
        fast = lambda qkv: attention(qkv, heads, groups)  # noqa: E731
        reference = lambda qkv: attention_reference(qkv, heads, groups)  # noqa: E731
        # Fused attention rounds its probabilities to the half type before the product with the values.
        compare(fast, reference, tensors, ("qkv",), half={"qkv"}) if name == "reference" else _compare_sdpa(
            fast, reference, tensors
        )


def _compare_sdpa(fast, reference, tensors: dict[str, Tensor]) -> None:
    exact = outputs_and_grads(reference, tensors, ("qkv",))
    for dtype in DTYPES:
        got = outputs_and_grads(fast, {"qkv": tensors["qkv"].to(dtype)}, ("qkv",))
        for name, value in exact.items():
            assert error(got[name], value) <= 8 * EPS[dtype] + 1e-13, (dtype, name)


def test_sequences_do_not_see_each_other() -> None:
    groups, heads, dim = [2, 3, 3, 2], 2, 8
    qkv = randn(12, 3 * dim)
    before = attention(qkv, heads, groups)
    qkv[3:6] += 1  # the second sequence
    after = attention(qkv, heads, groups)
    changed = (before != after).any(1)
    assert changed.tolist() == [False] * 3 + [True] * 3 + [False] * 6


def _opcheck_cases():
    groups = [3, 4, 2, 2]
    keep, kept = subset(groups, 3)
    index = torch.tensor([[0, 3], [1, 2], [0, 1]], dtype=torch.int32)
    x = randn(16, 8, dtype=torch.float32).requires_grad_()
    w = randn(8, seed=1, dtype=torch.float32).requires_grad_()
    y = randn(packing.num_tokens(packing.kept_groups(groups, kept)), 8, seed=2, dtype=torch.float32).requires_grad_()
    pos = randn(5, 8, seed=3, dtype=torch.float32).requires_grad_()
    weight = randn(8, 12, seed=4, dtype=torch.float32).requires_grad_()
    qkv = randn(16, 24, seed=5, dtype=torch.float32).requires_grad_()
    ops = torch.ops.pera
    return {
        "embed_tokens": (
            ops.embed_tokens,
            ([randn(r, 12, dtype=torch.float32) for r in (6, 3)], weight, w, [pos, pos], w, [index, index[:, 1:]]),
        ),
        "mask_tokens": (ops.mask_tokens, (x[:9].detach().requires_grad_(), w, pos, index, 0)),
        "mask_tokens_rest": (ops.mask_tokens, (x[:13].detach().requires_grad_(), w, pos, index, 4)),
        "sequence_norm": (ops.sequence_norm, (x, w, w, 1e-6, keep, groups, kept)),
        "sequence_norm_all": (ops.sequence_norm, (x, w, w, 1e-6, None, groups, [])),
        "sequence_add": (ops.sequence_add, (x, y, keep, groups, kept)),
        "attention": (ops.attention, (qkv, 2, groups)),
    }


@pytest.mark.parametrize("name", list(_opcheck_cases()))
def test_opcheck(name: str) -> None:
    op, args = _opcheck_cases()[name]
    torch.library.opcheck(op, args)


def test_compiles_as_one_graph() -> None:
    groups = [3, 4, 2, 2]
    keep, kept = subset(groups, 3)
    w = randn(8, seed=1, dtype=torch.float32)

    def branch(x: Tensor) -> Tensor:
        y = sequence_norm(x, w, w, 1e-6, groups, keep, kept)
        y = attention(torch.cat([y, y, y], dim=1), 2, packing.kept_groups(groups, kept))
        return sequence_add(x, y, groups, keep, kept)

    x = randn(16, 8, dtype=torch.float32).requires_grad_()
    compiled = torch.compile(branch, fullgraph=True, backend="aot_eager")
    want, got = branch(x), compiled(x)
    assert torch.equal(got, want)
    upstream = randn(16, 8, seed=7, dtype=torch.float32)
    assert torch.equal(torch.autograd.grad(got, x, upstream)[0], torch.autograd.grad(want, x, upstream)[0])


@given(
    sizes=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5)), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_gather_then_add_touches_kept_sequences_only(sizes: list[tuple[int, int]], seed: int) -> None:
    groups = [x for pair in sizes for x in pair]
    keep, kept = subset(groups, seed)
    x = randn(packing.num_tokens(groups), 3, seed=seed)
    y = packing.gather(x, keep, groups, kept)
    assert y.shape[0] == packing.num_tokens(packing.kept_groups(groups, kept))
    out = sequence_add(x, torch.ones_like(y), groups, keep, kept)
    for part, new, k, n_kept in zip(
        packing.split(x, groups), packing.split(out, groups), keep.split(kept), kept, strict=True
    ):
        delta = new - part
        mask = torch.zeros(part.shape[0], dtype=torch.bool)
        mask[k.long()] = True
        assert torch.all(delta[~mask] == 0)
        if n_kept:
            assert torch.allclose(delta[mask], torch.full_like(delta[mask], part.shape[0] / n_kept))


@pytest.mark.parametrize(
    "call",
    [
        lambda: sequence_norm(randn(5, 4), randn(4), randn(4), 1e-6, [2, 3]),
        lambda: sequence_add(randn(6, 4), randn(2, 4), [2, 3], torch.tensor([0], dtype=torch.int32), [1]),
        lambda: attention(randn(6, 10), 2, [2, 3]),
        lambda: embed_tokens(
            randn(6, 4), randn(3, 5), randn(3), randn(9, 3), randn(3), torch.zeros(2, 3, dtype=torch.int32)
        ),
        lambda: embed_tokens(
            [randn(6, 5)], randn(3, 5), randn(3), randn(9, 3), randn(3), [torch.zeros(2, 3, dtype=torch.int32)] * 2
        ),
        lambda: mask_tokens(randn(7, 4), randn(4), randn(9, 4), torch.zeros(2, 3, dtype=torch.int32)),
        lambda: mask_tokens(randn(7, 4), randn(4), randn(9, 4), torch.zeros(2, 3, dtype=torch.int32), rest=2),
        lambda: packing.pairs([1, 2, 3]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        call()
