"""Totals of partial sums: the Triton kernel against PyTorch, in the interpreter (test_interpreter.py) or on a GPU."""

import pytest
import torch
from packed_support import randn

pytest.importorskip("triton")

from pera_kernels import backend
from pera_kernels.partial_sums.triton import add_up

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def usable(device: str) -> torch.device:
    found = torch.device(device)
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if reason := backend.needs_triton(found):
        pytest.skip(reason)
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(3, 792, 40), (44, 100), (0, 33), (2, 0, 5), (2, 5, 16), (1, 257, 1)])
def test_equals_the_sum(shape: tuple[int, ...], device: str) -> None:
    x = randn(*shape, dtype=torch.float32).to(usable(device))
    exact = x.double().sum(-2)
    size = x.double().abs().sum(-2).clamp(min=1)
    assert ((add_up(x) - exact).abs() <= 8 * torch.finfo(torch.float32).eps * size).all()
    assert torch.equal(add_up(x), add_up(x))


@pytest.mark.parametrize("device", DEVICES)
def test_fills_a_part_of_a_tensor_from_a_part_of_another(device: str) -> None:
    x = torch.arange(3 * 6 * 4, dtype=torch.float32, device=usable(device)).view(3, 6, 4)
    out = torch.full((3, 4), -1.0, device=x.device)
    add_up(x[1:], out[1:])
    assert torch.equal(out[1:], x[1:].sum(1))
    assert (out[0] == -1).all()
    assert torch.equal(add_up(x[1:, :5]), x[1:, :5].sum(1))
