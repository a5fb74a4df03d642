"""cls_attention against its definition, and against the attention of all tokens."""

import pytest
import torch
from packed_support import DTYPES, EPS, error, randn

from pera_kernels.attention import attention
from pera_kernels.cls_attention import cls_attention, takes
from pera_kernels.cls_attention.reference import cls_attention as definition
from pera_kernels.packing import num_tokens

HEADS, DIM = 3, 24
CASES = [[3, 5, 7, 2], [1, 1], [4, 19, 0, 3], [2, 40], [0, 7, 2, 1], [5, 471, 9, 23]]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def tensors(groups: list[int]) -> list[torch.Tensor]:
    return [
        randn(num_tokens(groups), DIM, seed=1),
        randn(3 * DIM, DIM, seed=2) * DIM**-0.5,
        randn(3 * DIM, seed=3),
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_definition(groups: list[int], dtype: torch.dtype, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    rounded = [t.to(device, dtype) for t in tensors(groups)]
    exact = definition(*(t.double() for t in rounded), HEADS, groups)
    ours = error(cls_attention(*rounded, HEADS, groups), exact)
    torchs = error(definition(*rounded, HEADS, groups), exact)
    # The query, its product with W_k, the mean and the result are rounded once each, in the same dtype.
    assert ours <= 4 * torchs + 8 * EPS[dtype]


def test_equals_the_first_rows_of_the_attention_of_all_tokens() -> None:
    groups = [3, 9, 2, 4]
    x, weight, bias = (t.float() for t in tensors(groups))
    every = attention(torch.nn.functional.linear(x, weight, bias), HEADS, groups)
    first = torch.cat([every[:27].view(3, 9, DIM)[:, 0], every[27:].view(2, 4, DIM)[:, 0]])
    torch.testing.assert_close(cls_attention(x, weight, bias, HEADS, groups), first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_scores_are_as_exact_as_pytorchs(dtype: torch.dtype) -> None:
    """Scores in half precision would be off by whole units here."""
    groups = [2, 33]
    x, weight, bias = tensors(groups)
    weight[: 2 * DIM] *= 6
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    exact = definition(x.double(), weight.double(), bias.double(), HEADS, groups)
    qkv = torch.nn.functional.linear(x, weight, bias).view(2, 33, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    torchs = torch.nn.functional.scaled_dot_product_attention(*qkv)[:, :, 0].reshape(2, DIM)
    assert error(cls_attention(x, weight, bias, HEADS, groups), exact) <= 2 * error(torchs, exact)


def test_only_long_sequences_are_worth_it() -> None:
    assert takes([64, 471, 512, 23])
    assert not takes([64, 5])


def test_bad_shapes_are_refused() -> None:
    x, weight, bias = tensors([3, 5])
    with pytest.raises(ValueError, match="do not fit"):
        cls_attention(x, weight, bias, HEADS, [3, 6])
