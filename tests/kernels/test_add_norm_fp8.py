"""add_norm_fp8 against its definition."""

import pytest
import torch
from fp8_support import DTYPES, NAMES, ROUNDED, check
from packed_support import each_implementation, randn
from torch import Tensor
from torch.library import opcheck

from pera_kernels.add_norm_fp8 import add_norm_fp8_
from pera_kernels.add_norm_fp8 import op as norm_op

device = each_implementation("add_norm_fp8", *NAMES)


def rows_of(dtype: torch.dtype, *shape: int) -> list[Tensor]:
    """Stream, branch, its bias, weight, shift."""
    dim = shape[-1]
    x, y = (randn(*shape, seed=seed).to(dtype) for seed in (1, 2))
    return [x * 3 + 1, y, *(randn(dim, seed=seed, dtype=torch.float32) for seed in (3, 4, 5))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33, 64), (1, 41), (5, 768), (7, 1100)])
@pytest.mark.parametrize("adds", ["branch and bias", "branch", "nothing"])
def test_add_norm(adds: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    x, y, y_bias, weight, bias = rows_of(dtype, *shape)
    y, y_bias = None if adds == "nothing" else y, y_bias if "bias" in adds else None
    given = (x, y, y_bias, weight, bias)
    wide = [None if t is None else t.double() for t in given]
    stream = sum(t for t in wide[:3] if t is not None)
    exact = torch.nn.functional.layer_norm(stream, shape[1:], *wide[3:], 1e-6)
    x, *others = (None if t is None else t.to(device) for t in given)
    got = add_norm_fp8_(x, *others, 1e-6)
    # "composed" rounds the sum once more where there is a bias.
    torch.testing.assert_close(x.cpu().double(), stream, rtol=2 * ROUNDED[dtype], atol=2 * ROUNDED[dtype])
    check(got, exact, 4 * ROUNDED[dtype])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_values_stay_in_their_rows_and_are_seen(bad: float, device: torch.device) -> None:
    x = randn(4, 32, dtype=torch.float32).to(device)
    x[2, 5] = bad
    ones = torch.ones(32, device=device)
    values, scale = add_norm_fp8_(x.clone(), x, None, ones, ones, 1e-6)
    assert (values.float() * scale).isnan().any(1).tolist() == [False, False, True, False]


def test_no_rows_and_rows_of_zeros(device: torch.device) -> None:
    ones, nothing = torch.ones(16, device=device), torch.empty(0, 16, device=device)
    assert add_norm_fp8_(nothing.clone(), nothing, None, ones, ones, 1e-6).values.shape == (0, 16)
    values, scale = add_norm_fp8_(torch.zeros(2, 16, device=device), None, None, ones, 0 * ones, 1e-6)
    assert not values.float().any()
    assert scale.isfinite().all()


def test_repeats_give_equal_bits(device: torch.device) -> None:
    x, y, *parameters = (t.to(device) for t in rows_of(torch.float16, 9, 300))
    first, second = (add_norm_fp8_(x.clone(), y, *parameters, 1e-6) for _ in range(2))
    assert torch.equal(first.values.view(torch.uint8), second.values.view(torch.uint8))
    assert torch.equal(first.scale, second.scale)


def test_opcheck() -> None:
    x, y, *parameters = rows_of(torch.float32, 5, 8)
    opcheck(norm_op._add_norm_fp8, (x, y, *parameters, 1e-6))
    opcheck(norm_op._add_norm_fp8, (x, None, None, *parameters[1:], 1e-6))


def test_bad_arguments_are_refused() -> None:
    x, w = torch.ones(4, 8), torch.ones(8)
    with pytest.raises(ValueError, match="do not fit"):
        add_norm_fp8_(x, x[:3], None, w, w, 1e-6)
    with pytest.raises(ValueError, match="belongs to y"):
        add_norm_fp8_(x, None, w, w, w, 1e-6)
