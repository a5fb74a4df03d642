"""gelu against its definition: values, gradients, column sums, the tails."""

import pytest
import torch
from implementations import each_on_cpu
from packed_support import DTYPES, EPS, compare, error, randn
from torch.library import opcheck

from pera_kernels.gelu import gelu, gelu_, gelu_backward_, op
from pera_kernels.gelu.reference import gelu as definition

implementation = each_on_cpu("gelu", ["reference", "triton"], autouse=True)


@pytest.mark.parametrize("shape", [(37, 300), (1, 41), (0, 5), (5, 0), (3, 1000)])
def test_matches_the_definition(shape: tuple[int, int]) -> None:
    compare(gelu, definition, {"x": randn(*shape) * 2}, ("x",), half={"x"})


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_forms(dtype: torch.dtype) -> None:
    x, grad = (randn(45, 70, seed=seed).to(dtype) * 2 for seed in (1, 2))
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
    assert nothing.shape == (0, 70)
    assert torch.equal(again, got)
    assert torch.equal(same, sums)


def test_tails() -> None:
    """Every float16 from -12 to 12: the error is within a rounding, or below 2e-7 where |gelu| is tiny."""
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = x[x.abs() <= 12]
    want = definition(x.double())
    difference = (gelu(x).double() - want).abs()
    assert (difference <= want.abs() * 2**-10 + 1.5e-7 * x.double().abs() + 6e-8).all()


def test_not_finite_values() -> None:
    x = torch.tensor([float("nan"), 0.0, 30.0, -30.0])
    assert gelu(x).isnan().tolist() == [True, False, False, False]
    assert gelu(x)[1:].tolist() == [0.0, 30.0, 0.0]


def test_opcheck() -> None:
    opcheck(op._gelu, (randn(5, 7, dtype=torch.float32).requires_grad_(),))
    opcheck(op._gelu_inplace, (randn(5, 7, dtype=torch.float32),))
    x, grad = (randn(5, 7, seed=seed, dtype=torch.float32) for seed in (1, 2))
    for with_out in (False, True):
        opcheck(op._backward, (grad, x, with_out))
