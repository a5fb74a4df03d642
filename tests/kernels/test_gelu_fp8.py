"""gelu_fp8 against its definition."""

import pytest
import torch
from fp8_support import DTYPES, NAMES, ROUNDED, check
from packed_support import each_implementation, randn
from torch.library import opcheck

from pera_kernels.gelu.reference import gelu as gelu_definition
from pera_kernels.gelu_fp8 import gelu_fp8
from pera_kernels.gelu_fp8 import op as gelu_op

device = each_implementation("gelu_fp8", *NAMES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33, 64), (1, 41), (5, 1), (5, 3072), (4, 1500)])
def test_gelu(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    x = (randn(*shape) * 2).to(dtype)
    check(gelu_fp8(x.to(device)), gelu_definition(x.double()), 2 * ROUNDED[dtype])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_values_stay_in_their_rows_and_are_seen(bad: float, device: torch.device) -> None:
    x = randn(4, 32, dtype=torch.float32).to(device)
    x[2, 5] = bad
    values, scale = gelu_fp8(x)
    assert (values.float() * scale).isnan().any(1).tolist() == [False, False, True, False]


def test_no_rows_and_rows_of_zeros(device: torch.device) -> None:
    assert gelu_fp8(torch.empty(0, 16, device=device)).scale.shape == (0, 1)
    values, scale = gelu_fp8(torch.zeros(2, 16, device=device))
    assert not values.float().any()
    assert scale.isfinite().all()


def test_repeats_give_equal_bits(device: torch.device) -> None:
    x = randn(9, 300, dtype=torch.float16).to(device)
    first, second = gelu_fp8(x), gelu_fp8(x)
    assert torch.equal(first.values.view(torch.uint8), second.values.view(torch.uint8))
    assert torch.equal(first.scale, second.scale)


def test_opcheck() -> None:
    opcheck(gelu_op._gelu_fp8, (randn(5, 8, dtype=torch.float32),))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="wants a matrix"):
        gelu_fp8(torch.ones(8))
