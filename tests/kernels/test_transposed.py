"""transposed against its definition, and the weight gradients that take it."""

import pytest
import torch
from implementations import each_on_cpu, why_not
from packed_support import error, randn

from pera_kernels import products
from pera_kernels.isa import Isa, at_most, isa
from pera_kernels.transposed import transposed

implementation = each_on_cpu("transposed", ("avx512", "pytorch"))
SHAPES = [(1, 1), (33, 17), (31, 16), (32, 32), (64, 95), (100, 5), (3, 200), (0, 4), (4, 0), (130, 65)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_transposed(implementation: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = randn(*shape).to(dtype)
    got = transposed(x)
    assert got.dtype == dtype
    assert torch.equal(got, x.t())
    assert got.stride(1) == 1 or min(shape) == 0
    wide = randn(shape[0], shape[1] + 7, seed=1).to(dtype)
    assert torch.equal(transposed(wide[:, 3:-4]), wide[:, 3:-4].t())
    assert torch.equal(transposed(x.t()), x)


def test_every_thread_count_gives_the_same(implementation: str) -> None:
    x, before = randn(257, 300).to(torch.bfloat16), torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            assert torch.equal(transposed(x), x.t())
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(why_not("transposed", "avx512") is not None, reason="the kernel does not run here")
@pytest.mark.parametrize("x", [torch.zeros(4, 4), torch.zeros(4, 8).bfloat16()[:, ::2], torch.zeros(4).bfloat16()])
def test_wrong_arguments_of_the_kernel(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="x must be bfloat16 or half"):
        torch.ops.pera_native.transposed(x)


def test_shapes_of_fake_tensors() -> None:
    with torch._subclasses.fake_tensor.FakeTensorMode():
        assert torch.ops.pera.transposed(torch.empty(40, 6)).shape == (6, 64)


LIMITS = [Isa.BASE, Isa.AVX512_BF16, Isa.AMX]


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [5, products.TRANSPOSED_ROWS + 33])
def test_weight_gradients(rows: int, dtype: torch.dtype, limit: Isa, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs: rounded to bfloat16 once. The copy is made for long sums on tiles alone."""
    copies = []
    monkeypatch.setattr(products, "transposed", lambda x: copies.append(x.shape) or transposed(x))
    grad, x = randn(rows, 48).to(dtype), randn(rows, 32, seed=1).to(dtype)
    with at_most(limit):
        got = products.weight_gradient(grad, x, torch.float32)
        assert len(copies) == (isa() == Isa.AMX and dtype == torch.bfloat16 and rows > products.TRANSPOSED_ROWS)
    assert got.dtype == torch.float32
    want = grad.double().t() @ x.double()
    bound = 1.1 * error(want.to(dtype), want) + 1e-6
    assert error(got, want) <= bound


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 2**-8), (torch.float32, 2**-20)])
@pytest.mark.parametrize("rows", [None, slice(8, 40)])
def test_linear_with_a_bias(limit: Isa, dtype: torch.dtype, most: float, rows: slice | None) -> None:
    """The bias is added before the one rounding."""
    x, weight, bias = randn(70, 32).to(dtype), randn(48, 32, seed=1), 30 * randn(48, seed=2)
    half = [t.to(dtype) for t in (weight, bias)]
    with at_most(limit):
        got = products.linear(x, weight, bias, rows)
    want = (x.double() @ half[0].double().t() + half[1].double())[:, rows or slice(None)]
    assert got.dtype == dtype
    assert ((got.double() - want).abs() <= most * want.abs() + 1e-5).all()
