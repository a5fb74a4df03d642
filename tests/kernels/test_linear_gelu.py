"""linear_gelu against its definition: on a CPU, in the interpreter (test_interpreter.py) and on a GPU."""

import os

import pytest
import torch
from packed_support import DTYPES, EPS, error, randn

from pera_kernels import backend
from pera_kernels.linear_gelu import linear_gelu
from pera_kernels.linear_gelu.reference import linear_gelu as definition

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [(100, 96, 48), (33, 40, 16), (1, 8, 8), (64, 64, 64)]


def tensors(rows: int, width: int, depth: int, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    made = randn(rows, depth, seed=1), randn(width, depth, seed=2) * depth**-0.5, randn(width, seed=3)
    return [t.to(device, dtype) for t in made]


def check(dtype: torch.dtype, got: tuple[torch.Tensor, torch.Tensor], given: list[torch.Tensor]) -> None:
    exact = [t.double() for t in given]
    assert error(got[0], definition(*exact)) <= 4 * EPS[dtype]
    if got[1].shape[0]:
        assert error(got[1], torch.nn.functional.linear(*exact)) <= 4 * EPS[dtype]


@pytest.mark.parametrize("with_hidden", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_definition(shape: tuple[int, int, int], dtype: torch.dtype, with_hidden: bool) -> None:
    given = tensors(*shape, dtype)
    got = linear_gelu(*given, with_hidden)
    assert got[1].shape == (shape[0] if with_hidden else 0, shape[1])
    check(dtype, got, given)


@pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off: test_interpreter.py switches it on")
@pytest.mark.parametrize("with_hidden", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_kernel(shape: tuple[int, int, int], parts: int, with_hidden: bool) -> None:
    from pera_kernels.linear_gelu import triton

    given = tensors(*shape, torch.float16)
    tile = triton.Tile(32, 32, 16, 2, parts, 4, 3)
    check(torch.float16, triton.linear_gelu(*given, with_hidden, tile), given)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("with_hidden", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1200, 3072, 768), (1025, 104, 72), (5000, 1536, 384)])
def test_triton_on_a_gpu(shape: tuple[int, int, int], dtype: torch.dtype, with_hidden: bool) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    given = tensors(*shape, dtype, "cuda")
    with backend.use("triton"):
        check(dtype, linear_gelu(*given, with_hidden), given)


def test_opcheck_of_shapes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, weight, bias = torch.empty(7, 8), torch.empty(16, 8), torch.empty(16)
        for with_hidden in (False, True):
            out, hidden = torch.ops.pera.linear_gelu(x, weight, bias, with_hidden)
            assert out.shape == (7, 16)
            assert hidden.shape == (7 if with_hidden else 0, 16)
