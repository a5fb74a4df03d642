"""add_norm_fp8 and gelu_fp8 against their definitions."""

import pytest
import torch
from packed_support import each_implementation, randn
from torch import Tensor
from torch.library import opcheck

from pera_kernels import fp8
from pera_kernels.add_norm_fp8 import add_norm_fp8_
from pera_kernels.add_norm_fp8 import op as norm_op
from pera_kernels.gelu.reference import gelu as gelu_definition
from pera_kernels.gelu_fp8 import gelu_fp8
from pera_kernels.gelu_fp8 import op as gelu_op

NAMES = ("reference", "composed", "triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What "composed" rounds before e4m3 does, and where the kernels' arithmetic is not PyTorch's.
ROUNDED = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}

TAIL = 1e-6  # absolute: the error of erf, where a GELU is next to nothing


device = each_implementation("gelu_fp8", *NAMES)


def check(got: fp8.Rows, exact: Tensor, rounded: float) -> None:
    """Each value within half a step of e4m3 of the exact one, and what is rounded before; scales likewise.

    Half a step is 2^-4 of a number at most, and 2^-10 of the scale for the subnormal ones.
    """
    values, scale = got.values.cpu(), got.scale.cpu().double()
    assert (values.dtype, got.scale.dtype, scale.shape) == (fp8.E4M3, torch.float32, (exact.shape[0], 1))
    largest = exact.abs().amax(1, keepdim=True)
    torch.testing.assert_close(scale, largest / fp8.LARGEST, rtol=rounded, atol=TAIL / fp8.LARGEST)
    error = (values.double() * scale - exact).abs()
    assert (error <= exact.abs() * 2**-4 * 1.001 + scale * 2**-10 + rounded * largest + TAIL).all()
    # Rounding to the nearest has 2.6 % of the norm; dropping the rest would have twice that.
    assert error.norm() <= 0.027 * exact.norm() + rounded * largest.norm() * exact.shape[1] ** 0.5


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33, 64), (1, 41), (5, 1), (5, 3072), (4, 1500)])
def test_gelu(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    x = (randn(*shape) * 2).to(dtype)
    check(gelu_fp8(x.to(device)), gelu_definition(x.double()), 2 * ROUNDED[dtype])


def test_not_finite_values_stay_in_their_rows_and_are_seen(device: torch.device) -> None:
    for bad in (float("nan"), float("inf")):
        x = randn(4, 32, dtype=torch.float32).to(device)
        x[2, 5] = bad
        ones = torch.ones(32, device=device)
        found = [gelu_fp8(x), add_norm_fp8_(x.clone(), x, None, ones, ones, 1e-6)]
        for values, scale in found:
            assert (values.float() * scale).isnan().any(1).tolist() == [False, False, True, False]


def test_no_rows_and_rows_of_zeros(device: torch.device) -> None:
    ones, nothing = torch.ones(16, device=device), torch.empty(0, 16, device=device)
    assert gelu_fp8(nothing).scale.shape == (0, 1)
    assert add_norm_fp8_(nothing.clone(), nothing, None, ones, ones, 1e-6).values.shape == (0, 16)
    zeros = torch.zeros(2, 16, device=device)
    for values, scale in (gelu_fp8(zeros), add_norm_fp8_(zeros.clone(), None, None, ones, 0 * ones, 1e-6)):
        assert not values.float().any()
        assert scale.isfinite().all()


def test_repeats_give_equal_bits(device: torch.device) -> None:
    x, y, *parameters = (t.to(device) for t in rows_of(torch.float16, 9, 300))
    for function in (lambda: gelu_fp8(x), lambda: add_norm_fp8_(x.clone(), y, *parameters, 1e-6)):
        first, second = function(), function()
        assert torch.equal(first.values.view(torch.uint8), second.values.view(torch.uint8))
        assert torch.equal(first.scale, second.scale)


def test_opcheck() -> None:
    x, y, *parameters = rows_of(torch.float32, 5, 8)
    opcheck(gelu_op._gelu_fp8, (x,))
    opcheck(norm_op._add_norm_fp8, (x, y, *parameters, 1e-6))
    opcheck(norm_op._add_norm_fp8, (x, None, None, *parameters[1:], 1e-6))


def test_bad_arguments_are_refused() -> None:
    x, w = torch.ones(4, 8), torch.ones(8)
    with pytest.raises(ValueError, match="do not fit"):
        add_norm_fp8_(x, x[:3], None, w, w, 1e-6)
    with pytest.raises(ValueError, match="belongs to y"):
        add_norm_fp8_(x, None, w, w, w, 1e-6)
    with pytest.raises(ValueError, match="wants a matrix"):
        gelu_fp8(w)
