"""unit_rows against its definition: on a CPU, in the interpreter and on a GPU."""

import pytest
import torch
from packed_support import compare, each_implementation, outputs_and_grads, randn

from pera_kernels.unit_rows import unit_rows
from pera_kernels.unit_rows.reference import unit_rows as definition

SHAPES = [(37, 24), (1, 7), (300, 256), (5, 1000)]


LEAST = 0.5


device = each_implementation("unit_rows", "reference", "triton")


@pytest.mark.parametrize("shape", SHAPES)
def test_unit_rows(shape: tuple[int, int], device: torch.device) -> None:
    """Some rows are shorter than what divides at the least, one is zero."""
    x = randn(*shape)
    x[::3] *= 0.01 / shape[1] ** 0.5
    x[-1] = 0
    x = x.to(device)
    compare(lambda x: unit_rows(x, LEAST), lambda x: definition(x, LEAST), {"x": x}, ("x",), half={"x"})


def test_gradient_of_a_row_at_the_least_length(device: torch.device) -> None:
    """As PyTorch's clamp: there the length still has its gradient."""
    x = torch.tensor([[LEAST, 0.0], [0.1, 0.0]], device=device)
    want = outputs_and_grads(lambda x: definition(x, LEAST), {"x": x}, ("x",))
    got = outputs_and_grads(lambda x: unit_rows(x, LEAST), {"x": x}, ("x",))
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_shapes_of_fake_tensors() -> None:
    with torch._subclasses.fake_tensor.FakeTensorMode():
        fake = torch.empty(4, 6)
        assert torch.ops.pera.unit_rows(fake, LEAST).shape == (4, 6)
        assert torch.ops.pera.unit_rows_backward(fake, fake, LEAST).shape == (4, 6)
