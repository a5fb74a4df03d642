"""mask_tokens against its reference; what it shares with others is in test_packed_kernels.py."""

import pytest
import torch
from packed_support import (
    compare,
    implementation,  # noqa: F401 a fixture
    randn,
)

from pera_kernels.mask_tokens import mask_tokens
from pera_kernels.mask_tokens.reference import mask_tokens as mask_reference


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


@pytest.mark.parametrize("rest", [0, 4])
def test_opcheck(rest: int) -> None:
    index = torch.tensor([[0, 3], [1, 2], [0, 1]], dtype=torch.int32)
    tokens, w, pos = (randn(*s, dtype=torch.float32).requires_grad_() for s in ((9 + rest, 8), (8,), (5, 8)))
    torch.library.opcheck(torch.ops.pera.mask_tokens, (tokens, w, pos, index, rest))


@pytest.mark.parametrize(
    "call",
    [
        lambda: mask_tokens(randn(7, 4), randn(4), randn(9, 4), torch.zeros(2, 3, dtype=torch.int32)),
        lambda: mask_tokens(randn(7, 4), randn(4), randn(9, 4), torch.zeros(2, 3, dtype=torch.int32), rest=2),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        call()
