"""column_sums against its definition: on a CPU, in the interpreter and on a GPU."""

import pytest
import torch
from packed_support import EPS, each_implementation, error, randn

from pera_kernels.column_sums import column_sums

SHAPES = [(37, 24), (1, 7), (300, 256), (5, 1000)]


device = each_implementation("column_sums", "reference", "triton")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 5), (2000, 33)])
def test_column_sums(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    x = randn(*shape).to(dtype).to(device)
    got = column_sums(x)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact, size = x.double().sum(0), x.double().abs().sum(0).clamp(min=1)
    assert ((got - exact).abs() <= 8 * EPS[got.dtype] * size).all()
    assert torch.equal(column_sums(x), got)
    assert error(column_sums(x.t().contiguous().t()), got) <= 8 * EPS[got.dtype]


def test_shapes_of_fake_tensors() -> None:
    with torch._subclasses.fake_tensor.FakeTensorMode():
        assert torch.ops.pera.column_sums(torch.empty(4, 6)).shape == (6,)
