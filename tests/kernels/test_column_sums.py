"""column_sums against its definition: on a CPU, in the interpreter and on a GPU."""

import pytest
import torch
from implementations import runs, with_threads
from packed_support import EPS, each_implementation, error, randn

from pera_kernels import backend
from pera_kernels.column_sums import column_sums

SHAPES = [(37, 24), (1, 7), (300, 256), (5, 1000)]


device = each_implementation("column_sums", "reference", "native", "triton")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 5), (5, 0), (2000, 33)])
def test_column_sums(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    x = randn(*shape).to(dtype).to(device)
    got = column_sums(x)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact, size = x.double().sum(0), x.double().abs().sum(0).clamp(min=1)
    assert ((got - exact).abs() <= 8 * EPS[got.dtype] * size).all()
    assert torch.equal(column_sums(x), got)
    assert error(column_sums(x.t().contiguous().t()), got) <= 8 * EPS[got.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_lie_apart(dtype: torch.dtype, device: torch.device) -> None:
    wide = randn(67, 40).to(dtype).to(device)
    for x in (wide[:, 3:20], wide[::3], wide[5:6, :1], wide[:1].expand(67, 40)):
        assert torch.equal(column_sums(x), column_sums(x.contiguous()))


def test_not_finite_values_stay_in_their_columns(device: torch.device) -> None:
    x = torch.ones(70, 20, dtype=torch.bfloat16, device=device)
    x[3, 1], x[40, 2] = float("nan"), float("-inf")
    sums = column_sums(x).tolist()
    assert sums[0] == 70
    assert sums[1] != sums[1]
    assert sums[2:] == [float("-inf"), *[70.0] * 17]


@pytest.mark.skipif(not runs("column_sums", "native"), reason="the native library is not built")
def test_equal_bits_for_any_number_of_threads() -> None:
    x = randn(2500, 300, dtype=torch.bfloat16)
    with backend.use("native"):
        one, *others = with_threads(lambda: column_sums(x), 1, 2, 16)
    assert all(torch.equal(other, one) for other in others)


def test_shapes_of_fake_tensors() -> None:
    with torch._subclasses.fake_tensor.FakeTensorMode():
        assert torch.ops.pera.column_sums(torch.empty(4, 6)).shape == (6,)
