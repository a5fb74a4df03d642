"""add_norm against its definition: outputs, gradients, sums, subsets, edges."""

import pytest
import torch
from implementations import each_on_cpu, why_not, with_threads
from packed_support import compare, outputs_and_grads, randn, subset
from torch import Tensor
from torch.library import opcheck

from pera_kernels import backend, packing
from pera_kernels.add_norm import add_norm, add_norm_, add_norm_backward, op
from pera_kernels.add_norm.reference import add_norm as definition

GROUPS = [[3, 5, 7, 2], [1, 1], [4, 9, 0, 3], [2, 17, 5, 8, 1, 1]]
NAMES = ("x", "y", "y_bias", "weight", "bias")


implementation = each_on_cpu("add_norm", ["reference", "native-base", "native-avx512", "triton"])


def case(groups: list[int], subsets: bool, dim: int = 8, norm: bool = True):
    """(op, definition, tensors, those that take a gradient); the sum and the normalised rows as one result."""
    add_keep, add_kept = subset(groups, 1) if subsets else (None, [])
    norm_keep, norm_kept = subset(groups, 2, 0.5) if subsets else (None, [])
    places = [
        None if keep is None else packing.with_places(keep, groups, kept)
        for keep, kept in ((add_keep, add_kept), (norm_keep, norm_kept))
    ]
    rows = packing.num_tokens(packing.kept_groups(groups, add_kept or None))
    tensors = {
        "x": randn(packing.num_tokens(groups), dim, seed=1) * 3 + 1,
        "y": randn(rows, dim, seed=2),
        "y_bias": randn(dim, seed=3),
    }
    if norm:
        tensors |= {"weight": randn(dim, seed=4), "bias": randn(dim, seed=5)}

    def fast(x, y, y_bias, weight=None, bias=None) -> Tensor:
        sets = places[0], add_kept, places[1], norm_kept
        return torch.cat(add_norm(x, y, y_bias, weight, bias, 1e-6, groups, *sets)[:2])

    def reference(x, y, y_bias, weight=None, bias=None) -> Tensor:
        sets = add_keep, add_kept, norm_keep, norm_kept
        return torch.cat(definition(x, y, y_bias, weight, bias, 1e-6, groups, *sets))

    return fast, reference, tensors, tuple(tensors)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("subsets", [False, True])
@pytest.mark.usefixtures("implementation")
def test_matches_the_definition(groups: list[int], subsets: bool) -> None:
    fast, reference, tensors, takes = case(groups, subsets)
    compare(fast, reference, tensors, takes, half={"x", "y"})


@pytest.mark.parametrize("subsets", [False, True])
@pytest.mark.usefixtures("implementation")
def test_without_a_norm_it_adds(subsets: bool) -> None:
    fast, reference, tensors, takes = case(GROUPS[0], subsets, norm=False)
    compare(fast, reference, tensors, takes, half={"x", "y"})


@pytest.mark.parametrize("dim", [5, 37, 264])
@pytest.mark.usefixtures("implementation")
def test_odd_and_wide_rows(dim: int) -> None:
    fast, reference, tensors, takes = case(GROUPS[0], True, dim)
    compare(fast, reference, tensors, takes, half={"x", "y"})


@pytest.mark.usefixtures("implementation")
def test_in_place_gives_the_same() -> None:
    groups, dim = [5, 4, 3, 2], 12
    x, y, *parameters = (randn(*shape, dtype=torch.float32) for shape in ((26, dim), (26, dim), (dim,), (dim,), (dim,)))
    stream, normed, _, _ = add_norm(x, y, *parameters, 1e-6, groups)
    torch.testing.assert_close(add_norm_(x, y, *parameters, 1e-6, groups), normed)
    torch.testing.assert_close(x, stream, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("implementation")
def test_gradient_of_the_norm_alone_and_of_the_stream_alone() -> None:
    """What a branch asks for that had nothing to add, or whose stream nobody reads."""
    groups, dim = [3, 4, 2, 2], 6
    x, weight = randn(16, dim, dtype=torch.float32), randn(dim, dtype=torch.float32)
    grad, grad_normed = randn(16, dim, seed=1, dtype=torch.float32), randn(16, dim, seed=2, dtype=torch.float32)
    mean, rstd = x.mean(1), 1 / (x.var(1, correction=0) + 1e-6).sqrt()
    both, _, sums = add_norm_backward(grad, grad_normed, x, weight, mean, rstd, groups, has_add=False, has_bias=False)
    alone, grad_y, again = add_norm_backward(None, grad_normed, x, weight, mean, rstd, groups)
    torch.testing.assert_close(both, alone + grad)
    torch.testing.assert_close(sums[:2], again[:2])
    assert not sums[2].any()
    torch.testing.assert_close(again[2], grad_y.sum(0))


@pytest.mark.usefixtures("implementation")
def test_every_value_is_written_and_repeats_give_equal_bits() -> None:
    """Memory from torch.empty is filled with NaN; no NaN may be left."""
    fast, _, tensors, takes = case(GROUPS[3], True, 37)
    tensors = {name: t.to(torch.float16 if name in "xy" else torch.float32) for name, t in tensors.items()}
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (outputs_and_grads(fast, tensors, takes) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) and not first[name].isnan().any() for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("subsets", [False, True])
def test_equal_bits_for_any_number_of_threads(subsets: bool, dtype: torch.dtype) -> None:
    if reason := why_not("add_norm", "native"):
        pytest.skip(reason)
    fast, _, tensors, takes = case([11, 50, 30, 7], subsets, 70)
    tensors = {name: t.to(dtype if name in "xy" else torch.float32) for name, t in tensors.items()}
    with backend.use("native"):
        one, *others = with_threads(lambda: outputs_and_grads(fast, tensors, takes), 1, 2, 16)
    assert all(torch.equal(other[name], one[name]) for other in others for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("implementation")
def test_rows_that_lie_apart(dtype: torch.dtype) -> None:
    groups, dim = [5, 4, 3, 2], 12
    wide = [randn(26, 3 * dim, seed=seed).to(dtype) for seed in range(4)]
    x, y, grad, grad_normed = (t[:, dim : 2 * dim] for t in wide)
    weight, bias = randn(dim, seed=5).float(), randn(dim, seed=6).float()
    close = [t.contiguous() for t in (x, y, grad, grad_normed)]
    for given in ((x, y), close[:2]):
        stream, normed, mean, rstd = add_norm(*given, None, weight, bias, 1e-6, groups)
        in_place = given[0].clone(memory_format=torch.preserve_format)
        again = add_norm_(in_place, given[1], None, weight, bias, 1e-6, groups)
        torch.testing.assert_close((in_place, again), (stream, normed))
    apart = add_norm_backward(grad, grad_normed, stream, weight, mean, rstd, groups)
    for got, want in zip(apart, add_norm_backward(*close[2:], stream, weight, mean, rstd, groups), strict=True):
        assert torch.equal(got, want)


@pytest.mark.usefixtures("implementation")
def test_no_sequences() -> None:
    x, w = torch.zeros(0, 5), torch.ones(5)
    stream, normed, mean, rstd = add_norm(x, x, w, w, w, 1e-6, [0, 3])
    assert stream.shape == normed.shape == (0, 5)
    grad_x, _, sums = add_norm_backward(x, x, x, w, mean, rstd, [0, 3])
    assert grad_x.shape == (0, 5)
    assert not sums.any()


def test_not_finite_values_stay_in_their_rows(implementation: str) -> None:
    groups, keep, kept = [3, 2], torch.tensor([2, 0], dtype=torch.int32), [2]
    places = packing.with_places(keep, groups, kept)
    x, y = randn(6, 9, dtype=torch.float32), randn(4, 9, seed=1, dtype=torch.float32)
    x[1, 3], x[3, 0] = float("nan"), float("inf")  # the second is in a sequence that is not kept
    ones, zeros = torch.ones(9), torch.zeros(9)
    stream, normed, _, _ = add_norm(x, y, None, ones, zeros, 1e-6, groups, places, kept, places, kept)
    assert normed.isnan().any(1).tolist() == [False, False, False, True]
    assert stream.isfinite().all(1).tolist() == [True, False, True, False, True, True]
    assert torch.equal(stream[2:4], x[2:4])


@pytest.mark.usefixtures("implementation")
def test_nothing_kept() -> None:
    groups, kept = [2, 3, 0, 4], [0, 0]
    places = packing.with_places(torch.zeros(0, dtype=torch.int32), groups, kept)
    x, w = randn(6, 5, dtype=torch.float32), torch.ones(5)
    stream, normed, _, _ = add_norm(x, x.new_empty(0, 5), w, w, w, 1e-6, groups, places, kept, places, kept)
    assert torch.equal(stream, x)
    assert normed.shape == (0, 5)


@pytest.mark.parametrize("subsets", [False, True])
def test_opcheck(subsets: bool) -> None:
    groups, dim = [3, 4, 2, 2], 6
    keep, kept = subset(groups, 1) if subsets else (None, [])
    places = None if keep is None else packing.with_places(keep, groups, kept)
    rows = packing.num_tokens(packing.kept_groups(groups, kept or None))
    tensors = [randn(*shape, dtype=torch.float32) for shape in ((16, dim), (rows, dim), (dim,), (dim,), (dim,))]
    inputs = (*(t.requires_grad_() for t in tensors), 1e-6, groups, places, kept, places, kept)
    opcheck(op._add_norm, inputs)
    with torch.no_grad():
        opcheck(
            op._add_norm_inplace, (*(randn(16, dim, dtype=torch.float32) for _ in range(2)), *tensors[2:], 1e-6, groups)
        )


def test_bad_shapes_are_refused() -> None:
    x, w = randn(6, 4, dtype=torch.float32), torch.ones(4)
    with pytest.raises(ValueError, match="do not hold"):
        add_norm(x, x[:5], None, w, w, 1e-6, [3, 2])
    with pytest.raises(ValueError, match="do not hold"):
        add_norm(x, x, None, w, w, 1e-6, [3, 3])


def test_places_say_where_each_sequence_is() -> None:
    keep = torch.tensor([[2, 0, 1], [1, 2, 0]], dtype=torch.int32)
    places = packing.with_places(keep, [3, 5, 2, 4], [2, 1])
    assert places.dtype == torch.int32
    assert places.tolist() == [[2, 0, 1, 1, -1, 0, -1, 0], [1, 2, 0, -1, 0, 1, 0, -1]]
