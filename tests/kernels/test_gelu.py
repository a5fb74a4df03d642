"""gelu against its definition: values, gradients, column sums, the tails, every half-precision number."""

import pytest
import torch
from implementations import each_on_cpu, runs, with_threads
from packed_support import DTYPES, EPS, compare, error, randn
from torch import Tensor
from torch.library import opcheck

from pera_kernels.gelu import gelu, gelu_, gelu_backward_, op
from pera_kernels.gelu.reference import gelu as definition

implementation = each_on_cpu("gelu", ["reference", "native-base", "native-avx512", "triton"], autouse=True)
SINGLE_OR_HALF = [torch.float32, torch.bfloat16, torch.float16]


def with_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(x) and its derivative, float64."""
    wide = x.double().requires_grad_()
    y = definition(wide)
    (slope,) = torch.autograd.grad(y.sum(), wide)
    return y.detach(), slope


def every(dtype: torch.dtype) -> Tensor:
    """Every number of a half type, infinities and NaN too."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("shape", [(37, 300), (1, 41), (0, 5), (5, 0), (3, 1000)])
def test_matches_the_definition(shape: tuple[int, int]) -> None:
    compare(gelu, definition, {"x": randn(*shape) * 2}, ("x",), half={"x"})


@pytest.mark.parametrize("shape", [(45, 70), (1, 33), (3, 64), (67, 1), (0, 5), (5, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_forms(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, grad = (randn(*shape, seed=seed).to(dtype) * 2 for seed in (1, 2))
    wide = x.double().requires_grad_()
    y = definition(wide)
    (want,) = torch.autograd.grad(y, wide, grad.double())
    assert error(gelu_(x.clone()), y) <= 3 * EPS[dtype]
    got = grad.clone()
    act, sums = gelu_backward_(got, x, with_out=True)
    # PyTorch rounds the gradient before it sums, and float32 has the error of its erf.
    assert error(act, y) <= 3 * EPS[dtype]
    assert error(got, want) <= 4 * EPS[dtype]
    assert error(sums, want.sum(0)) <= 4 * EPS[dtype]
    again = grad.clone()
    nothing, same = gelu_backward_(again, x)
    assert nothing.shape == (0, shape[1])
    assert torch.equal(again, got)
    assert torch.equal(same, sums)


@pytest.mark.parametrize("dtype", SINGLE_OR_HALF)
def test_rows_that_lie_apart(dtype: torch.dtype) -> None:
    wide, grads = randn(20, 90).to(dtype), randn(20, 90, seed=1).to(dtype)
    for of in (lambda t: t[:, 3:50], lambda t: t[::2], torch.t):
        x, grad = of(wide), of(grads.clone())
        y, slope = with_slope(x)
        assert error(gelu(x), y) <= 3 * EPS[dtype]
        want = slope * grad.double()
        act, sums = gelu_backward_(grad, x, with_out=True)
        assert error(act, y) <= 3 * EPS[dtype]
        assert error(grad, want) <= 4 * EPS[dtype]
        assert error(sums, want.sum(0)) <= 4 * EPS[dtype]
        assert error(gelu_(of(wide.clone())), y) <= 3 * EPS[dtype]


def test_tails() -> None:
    """Every float16 from -12 to 12: the error is within a rounding, or below 2e-7 where |gelu| is tiny."""
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = x[x.abs() <= 12]
    want = definition(x.double())
    difference = (gelu(x).double() - want).abs()
    assert (difference <= want.abs() * 2**-10 + 1.5e-7 * x.double().abs() + 6e-8).all()


@pytest.fixture
def native(implementation: str) -> None:
    if implementation != "native":
        pytest.skip("not promised of PyTorch and Triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("native")
def test_every_number_of_a_half_type(dtype: torch.dtype) -> None:
    """The result is float64's, rounded, or the next number where that lies near the middle between both."""
    x = every(dtype)
    x = x[x.isfinite() & (x.double().abs() < 1e37)]
    y, slope = with_slope(x)
    least = {torch.bfloat16: 4e-9, torch.float16: 3.1e-8}[dtype]  # zero beyond -6; half of the smallest float16
    assert ((gelu(x).double() - y).abs() <= 2.1 * EPS[dtype] * y.abs() + least).all()
    grad = torch.ones_like(x)[None]
    gelu_backward_(grad, x[None])
    assert ((grad[0].double() - slope).abs() <= 2.1 * EPS[dtype] * slope.abs() + 1e-6).all()


@pytest.mark.usefixtures("native")
def test_float32_is_good_to_a_few_units_in_the_last_place() -> None:
    x = torch.linspace(-12, 12, 480_001)
    y, slope = with_slope(x)
    bound = y.abs() * 2**-24 * (12 + 1.5 * x.double() ** 2)  # x * x is rounded in the exponent
    assert ((gelu(x).double() - y).abs() <= bound).all()
    grad = torch.ones_like(x)[None]
    act, _ = gelu_backward_(grad, x[None], with_out=True)
    assert ((act[0].double() - y).abs() <= bound).all()
    assert ((grad[0].double() - slope).abs() <= slope.abs() * 2**-22 + 1e-7).all()


@pytest.mark.parametrize("dtype", SINGLE_OR_HALF)
@pytest.mark.usefixtures("native")
def test_not_finite_values_are_those_of_the_formula(dtype: torch.dtype) -> None:
    """x * Phi(x) is infinite at infinity and, as 0 times infinity, not a number at minus infinity."""
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 3e4, -3e4] * 9, dtype=dtype)
    want = torch.tensor([float("nan"), float("inf"), float("nan"), 0.0, 0.0, x[5], 0.0] * 9, dtype=dtype)
    torch.testing.assert_close(gelu(x), want, rtol=0, atol=0, equal_nan=True)
    nan = float("nan")
    grad = torch.ones(2, len(x), dtype=dtype)
    grad[1, 3] = nan
    act, sums = gelu_backward_(grad, x.expand(2, -1).contiguous(), with_out=True)
    torch.testing.assert_close(act[0], want, rtol=0, atol=0, equal_nan=True)
    slopes = torch.tensor([nan, nan, nan, 0.5, 0.5, 1.0, 0.0] * 9, dtype=dtype)
    torch.testing.assert_close(grad[0], slopes, rtol=0, atol=0, equal_nan=True)
    slopes[3] = nan
    torch.testing.assert_close(grad[1], slopes, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(sums.isnan(), slopes.isnan())


def test_not_finite_values() -> None:
    x = torch.tensor([float("nan"), 0.0, 30.0, -30.0])
    assert gelu(x).isnan().tolist() == [True, False, False, False]
    assert gelu(x)[1:].tolist() == [0.0, 30.0, 0.0]


@pytest.mark.parametrize("dtype", SINGLE_OR_HALF)
@pytest.mark.usefixtures("native")
def test_equal_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    x, grad = (randn(700, 130, seed=seed, dtype=dtype) for seed in (1, 2))

    def run() -> list[Tensor]:
        dx = grad.clone()
        return [gelu(x), gelu_(x.clone()), *gelu_backward_(dx, x, with_out=True), dx]

    one, *others = with_threads(run, 1, 2, 16)
    assert all(torch.equal(a, b) for other in others for a, b in zip(other, one, strict=True))


@pytest.mark.skipif(not runs("gelu", "native"), reason="the native library is not built")
def test_bad_arguments() -> None:
    native = torch.ops.pera_native
    x = torch.ones(4, 6)
    for out in (x[:, :5], x[:3], x.half()):
        with pytest.raises((ValueError, RuntimeError), match="contiguous"):
            native.gelu(x, out, False)
        with pytest.raises((ValueError, RuntimeError), match="contiguous"):
            native.gelu_backward_(x, out, x[:0], False)


def test_opcheck() -> None:
    opcheck(op._gelu, (randn(5, 7, dtype=torch.float32).requires_grad_(),))
    opcheck(op._gelu_inplace, (randn(5, 7, dtype=torch.float32),))
    x, grad = (randn(5, 7, seed=seed, dtype=torch.float32) for seed in (1, 2))
    for with_out in (False, True):
        opcheck(op._backward, (grad, x, with_out))
