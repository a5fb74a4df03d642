"""sequence_norm against its reference; what it shares with others is in test_packed_kernels.py."""

import pytest
import torch
from implementations import each_on_cpu
from packed_support import compare, randn, subset

from pera_kernels import packing
from pera_kernels.sequence_norm import sequence_norm
from pera_kernels.sequence_norm.reference import sequence_norm as norm_reference

GROUPS = [[3, 5, 7, 2], [1, 1], [4, 9, 0, 3], [2, 17, 5, 8, 1, 1]]


implementation = each_on_cpu("sequence_norm", ["reference", "native-base", "native-avx512", "triton"])


@pytest.mark.parametrize(
    ("groups", "dim"), [*((groups, 8) for groups in GROUPS), *((GROUPS[0], dim) for dim in (5, 37, 264))]
)
@pytest.mark.parametrize("subsets", [False, True])
@pytest.mark.usefixtures("implementation")
def test_sequence_norm(groups: list[int], dim: int, subsets: bool) -> None:
    keep, kept = subset(groups, 1) if subsets else (None, [])
    tensors = {
        "x": randn(packing.num_tokens(groups), dim, seed=1) * 3 + 1,
        "weight": randn(dim, seed=2),
        "bias": randn(dim, seed=3),
    }
    fast = lambda **t: sequence_norm(**t, eps=1e-6, groups=groups, keep=keep, kept_counts=kept)  # noqa: E731
    reference = lambda **t: norm_reference(**t, eps=1e-6, keep=keep, groups=groups, kept_counts=kept)  # noqa: E731
    compare(fast, reference, tensors, ("x", "weight", "bias"), half={"x"})


@pytest.mark.parametrize("subsets", [False, True])
def test_opcheck(subsets: bool) -> None:
    groups = [3, 4, 2, 2]
    keep, kept = subset(groups, 3) if subsets else (None, [])
    x, w = randn(16, 8, dtype=torch.float32).requires_grad_(), randn(8, seed=1, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(torch.ops.pera.sequence_norm, (x, w, w, 1e-6, keep, groups, kept))


@pytest.mark.parametrize(
    "call",
    [
        lambda: sequence_norm(randn(5, 4), randn(4), randn(4), 1e-6, [2, 3]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        call()
