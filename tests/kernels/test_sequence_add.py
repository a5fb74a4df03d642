"""sequence_add against its reference; what it shares with others is in test_packed_kernels.py."""

import pytest
import torch
from packed_support import (
    compare,
    implementation,  # noqa: F401 a fixture
    randn,
    subset,
)

from pera_kernels import packing
from pera_kernels.sequence_add import sequence_add
from pera_kernels.sequence_add.reference import sequence_add as add_reference

GROUPS = [[3, 5, 7, 2], [1, 1], [4, 9, 0, 3], [2, 17, 5, 8, 1, 1]]


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


def test_opcheck() -> None:
    groups = [3, 4, 2, 2]
    keep, kept = subset(groups, 3)
    rows = packing.num_tokens(packing.kept_groups(groups, kept))
    x, y = (randn(n, 8, seed=n, dtype=torch.float32).requires_grad_() for n in (16, rows))
    torch.library.opcheck(torch.ops.pera.sequence_add, (x, y, keep, groups, kept))


@pytest.mark.parametrize(
    "call",
    [
        lambda: sequence_add(randn(6, 4), randn(2, 4), [2, 3], torch.tensor([0], dtype=torch.int32), [1]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        call()
