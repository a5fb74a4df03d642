"""Every implementation of the ops on packed tokens: wide and odd rows, many tasks, memory, threads, layouts, limits."""

import pytest
import torch
from packed_support import (
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
from pera_kernels.embed_tokens import embed_tokens
from pera_kernels.embed_tokens.reference import embed_tokens as embed_reference
from pera_kernels.mask_tokens import mask_tokens
from pera_kernels.mask_tokens.reference import mask_tokens as mask_reference
from pera_kernels.sequence_add import sequence_add
from pera_kernels.sequence_add.reference import sequence_add as add_reference
from pera_kernels.sequence_norm import sequence_norm
from pera_kernels.sequence_norm.reference import sequence_norm as norm_reference

OPS = ["embed_tokens", "mask_tokens", "sequence_norm", "sequence_add"]
HALF = {"rows", "tokens", "x", "y"}  # what comes in the compute dtype; parameters are float32


def patches(n_seq: int, n: int, grid: int) -> Tensor:
    draw = torch.Generator().manual_seed(n_seq)
    return torch.rand(n_seq, grid, generator=draw).argsort(1)[:, :n].sort(1).values.int()


def case(op: str, dim: int, n_seq: int = 5, n: int = 6, strided_numbers: bool = False):
    """(op, reference, its tensors, those that take a gradient), for n_seq sequences and some short ones.

    strided_numbers: index and keep are not contiguous.
    """
    grid = 9
    index = patches(n_seq, n, grid)
    groups = [n_seq, 1 + n, 2 * n_seq, 3]
    keep, kept = subset(groups, 1)
    if strided_numbers:
        index, keep = (torch.stack([t, t], -1)[..., 0] for t in (index, keep))
    tokens = packing.num_tokens(groups)
    branch = packing.num_tokens(packing.kept_groups(groups, kept))
    parameters = {"pos": randn(1 + grid, dim, seed=4)}
    if op == "embed_tokens":
        tensors = {"rows": randn(n_seq * n, 12, seed=1), "weight": randn(dim, 12, seed=2), "bias": randn(dim, seed=3)}
        tensors |= parameters | {"cls": randn(dim, seed=5)}
        takes = ("weight", "bias", "pos", "cls")
        return lambda **t: embed_tokens(**t, index=index), lambda **t: embed_reference(**t, index=index), tensors, takes
    if op == "mask_tokens":
        tensors = {"tokens": randn(n_seq * 4, dim, seed=1), "mask_token": randn(dim, seed=2), **parameters}
        takes = ("tokens", "mask_token", "pos")
        return lambda **t: mask_tokens(**t, index=index), lambda **t: mask_reference(**t, index=index), tensors, takes
    packed = {"groups": groups, "keep": keep, "kept_counts": kept}
    if op == "sequence_norm":
        tensors = {"x": randn(tokens, dim, seed=1) * 3 + 1, "weight": randn(dim, seed=2), "bias": randn(dim, seed=3)}
        fast = lambda **t: sequence_norm(**t, eps=1e-6, **packed)  # noqa: E731
        return fast, lambda **t: norm_reference(**t, eps=1e-6, **packed), tensors, ("x", "weight", "bias")
    tensors = {"x": randn(tokens, dim, seed=1), "y": randn(branch, dim, seed=2)}
    return lambda **t: sequence_add(**t, **packed), lambda **t: add_reference(**t, **packed), tensors, ("x", "y")


def in_dtype(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype if name in HALF else torch.float32) for name, t in tensors.items()}


def equal_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dim", [5, 37, 264])
@pytest.mark.usefixtures("implementation")
def test_odd_and_wide_rows(op: str, dim: int) -> None:
    fast, reference, tensors, takes = case(op, dim)
    compare(fast, reference, tensors, takes, half=HALF)


@pytest.mark.parametrize("op", OPS)
def test_more_rows_than_one_task_takes(op: str, implementation: str) -> None:  # noqa: F811
    n_seq = 20 if implementation == "triton" else 150  # the interpreter is slow; 17 sequences are two chunks
    fast, reference, tensors, takes = case(op, 20, n_seq=n_seq, n=7)
    compare(fast, reference, tensors, takes, half=HALF)


@pytest.mark.parametrize("op", OPS)
def test_every_value_is_written(op: str, implementation: str) -> None:  # noqa: F811
    """Memory from torch.empty and at::empty is filled with NaN; no NaN may be left."""
    fast, _, tensors, takes = case(op, 37)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        assert torch.empty(3).isnan().all()
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            got = outputs_and_grads(fast, in_dtype(tensors, dtype), takes)
            assert not any(value.isnan().any() for value in got.values()), dtype
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("op", OPS)
def test_repeats_and_threads_give_equal_bits(op: str, implementation: str) -> None:  # noqa: F811
    fast, _, tensors, takes = case(op, 37, n_seq=5 if implementation == "triton" else 60)
    tensors = in_dtype(tensors, torch.bfloat16)
    before = torch.get_num_threads()
    first = outputs_and_grads(fast, tensors, takes)
    if op == "embed_tokens":
        first.pop("weight")  # PyTorch's matrix product
    try:
        for threads in (1, 2, 3) if implementation == "native" else (before,):
            torch.set_num_threads(threads)
            assert equal_bits(first, outputs_and_grads(fast, tensors, takes)), threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("implementation")
def test_layout_of_the_inputs_does_not_matter(op: str) -> None:
    fast, _, tensors, takes = case(op, 10)
    tensors = in_dtype(tensors, torch.float32)
    want = outputs_and_grads(fast, tensors, takes)
    strided = {name: torch.stack([t, t], -1)[..., 0] for name, t in tensors.items()}
    assert not any(t.is_contiguous() for t in strided.values())
    same = lambda **t: fast(**{name: torch.stack([t[name]] * 2, -1)[..., 0] for name in t})  # noqa: E731
    numbers, *_ = case(op, 10, strided_numbers=True)
    for got in outputs_and_grads(same, strided, takes), outputs_and_grads(numbers, tensors, takes):
        if op == "embed_tokens":  # its products are BLAS's, which may sum another layout in another order
            for name, value in want.items():
                assert error(got[name], value) <= 4 * EPS[torch.float32], name
        else:
            assert equal_bits(want, got)


def test_mask_tokens_rounds_once_and_copies_the_rest(implementation: str) -> None:  # noqa: F811
    fast, reference, tensors, _ = case("mask_tokens", 37)
    # Triton's interpreter cuts bfloat16 instead of rounding it.
    for dtype in (torch.float32, torch.float16) if implementation == "triton" else (torch.float32, torch.bfloat16):
        inputs = in_dtype(tensors, dtype)
        assert torch.equal(fast(**inputs), reference(**inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("implementation")
def test_sequence_add_and_sequence_norm_keep_not_finite_values_in_their_rows(dtype: torch.dtype) -> None:
    groups, keep, kept = [3, 2], torch.tensor([2, 0], dtype=torch.int32), [2]
    x = randn(6, 9, dtype=dtype)
    x[1, 3], x[3, 0] = float("nan"), float("inf")  # the second is in a sequence that is not kept
    y = sequence_norm(x, torch.ones(9), torch.zeros(9), 1e-6, groups, keep, kept)
    assert y.isnan().any(1).tolist() == [False, False, False, True]
    out = sequence_add(x, randn(4, 9, dtype=dtype), groups, keep, kept)
    assert out.isfinite().all(1).tolist() == [True, False, True, False, True, True]
    assert torch.equal(out[2:4], x[2:4])


@pytest.mark.usefixtures("implementation")
def test_sequence_add_and_sequence_norm_with_nothing_kept() -> None:
    groups, keep, kept = [2, 3, 0, 4], torch.zeros(0, dtype=torch.int32), [0, 0]
    x = randn(6, 5, dtype=torch.float32).requires_grad_()
    w = torch.ones(5, requires_grad=True)
    y = sequence_norm(x, w, w, 1e-6, groups, keep, kept)
    assert y.shape == (0, 5)
    for grad in torch.autograd.grad(y.sum(), (x, w)):
        assert torch.all(grad == 0)
    assert torch.equal(sequence_add(x, y, groups, keep, kept), x)


@pytest.mark.parametrize(
    ("op", "call"),
    [
        ("sequence_norm", lambda: sequence_norm(randn(6, 4).float(), *KEEP_PARAMETERS, [3, 2], _int([0, 3]), [2])),
        ("sequence_norm", lambda: sequence_norm(randn(6, 4).float(), *KEEP_PARAMETERS, [3, 2], _int([1, 1]), [2])),
        ("sequence_add", lambda: sequence_add(randn(6, 4).float(), randn(2, 4).float(), [3, 2], _int([-1]), [1])),
        ("mask_tokens", lambda: mask_tokens(randn(4, 4).float(), *POSITIONS, _int([[3], [9]]))),
        ("mask_tokens", lambda: mask_tokens(randn(4, 4).float(), *POSITIONS, _int([[3], [-1]]))),
    ],
)
def test_native_kernels_refuse_numbers_out_of_range(op: str, call) -> None:
    with backend.use("native"):
        try:
            backend.choose(op, torch.device("cpu"))
        except RuntimeError as reason:
            pytest.skip(str(reason))
        with pytest.raises((IndexError, ValueError), match=r"keep|index"):
            call()


KEEP_PARAMETERS = (torch.ones(4), torch.zeros(4), 1e-6)
POSITIONS = (torch.ones(4), torch.ones(10, 4))


def _int(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
