"""embed_tokens against its reference; what it shares with others is in test_packed_kernels.py."""

import pytest
import torch
from packed_support import (
    compare,
    implementation,  # noqa: F401 a fixture
    randn,
)

from pera_kernels.embed_tokens import embed_tokens
from pera_kernels.embed_tokens.reference import embed_tokens as embed_reference


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


def test_opcheck() -> None:
    index = torch.tensor([[0, 3], [1, 2], [0, 1]], dtype=torch.int32)
    weight = randn(8, 12, seed=4, dtype=torch.float32).requires_grad_()
    w, pos = (randn(*shape, seed=1, dtype=torch.float32).requires_grad_() for shape in ((8,), (5, 8)))
    rows = [randn(r, 12, dtype=torch.float32) for r in (6, 3)]
    torch.library.opcheck(torch.ops.pera.embed_tokens, (rows, weight, w, [pos, pos], w, [index, index[:, 1:]]))


@pytest.mark.parametrize(
    "call",
    [
        lambda: embed_tokens(
            randn(6, 4), randn(3, 5), randn(3), randn(9, 3), randn(3), torch.zeros(2, 3, dtype=torch.int32)
        ),
        lambda: embed_tokens(
            [randn(6, 5)], randn(3, 5), randn(3), randn(9, 3), randn(3), [torch.zeros(2, 3, dtype=torch.int32)] * 2
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        call()
