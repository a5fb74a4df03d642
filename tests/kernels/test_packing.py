"""Packed token groups: attention within sequences, subsets, and a branch of several ops as one graph."""

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
from pera_kernels.sequence_add import sequence_add
from pera_kernels.sequence_norm import sequence_norm

GROUPS = [[3, 5, 7, 2], [1, 1], [4, 9, 0, 3], [2, 17, 5, 8, 1, 1]]


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


def test_opcheck_of_attention() -> None:
    qkv = randn(16, 24, seed=5, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(torch.ops.pera.attention, (qkv, 2, [3, 4, 2, 2]))


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
        lambda: attention(randn(6, 10), 2, [2, 3]),
        lambda: packing.pairs([1, 2, 3]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        call()
