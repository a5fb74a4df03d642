"""Every op against its definition in float64, on a GPU and small on a CPU: values and gradients in odd shapes."""

import pytest
import torch
from op_cases import add_norm_case, gelu_case, loss_case, query_case, stream_case, tokens_case
from packed_support import EPS, error, needs_memory

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
DIMS = [8, 100, pytest.param(768, marks=GPU)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("op", ["embed_tokens", "mask_tokens"])
@pytest.mark.parametrize("device", DEVICES)
def test_tokens(op: str, dim: int, dtype: torch.dtype, device: str) -> None:
    tokens_case(op, dim).check(dtype, device)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("groups", [[5, 7, 9, 3], [1, 1], [3, 301, 0, 4]])
@pytest.mark.parametrize("op", ["sequence_norm", "sequence_add", "add_norm"])
@pytest.mark.parametrize("device", DEVICES)
def test_streams(op: str, groups: list[int], dim: int, dtype: torch.dtype, device: str) -> None:
    (add_norm_case(dim, groups) if op == "add_norm" else stream_case(op, dim, groups)).check(dtype, device)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_norm_of_all_sequences(dtype: torch.dtype, device: str) -> None:
    stream_case("sequence_norm", 768, [5, 7, 9, 3], subsets=False).check(dtype, device)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(37, 300), (1, 41), (0, 8), pytest.param((1031, 3072), marks=GPU)])
@pytest.mark.parametrize("device", DEVICES)
def test_gelu(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    gelu_case(*shape).check(dtype, device)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("groups", "queries"), [([5, 315, 7, 23], [158, 1]), ([3, 40], [33]), ([4, 19, 0, 3], [12, 1])]
)
@pytest.mark.parametrize("device", DEVICES)
def test_query_attention(groups: list[int], queries: list[int], dtype: torch.dtype, device: str) -> None:
    case = query_case(groups, queries)
    exact, got = case.run(case.definition, torch.float64, "cpu"), case.run(case.fast, dtype, device)
    for name, value in exact.items():  # fused attention rounds its probabilities before their product
        assert error(got[name].cpu(), value) <= 8 * EPS[dtype] + 1e-5, name


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(12, 200, 24), (9, 1031, 40), pytest.param((64, 4096, 256), marks=GPU)])
@pytest.mark.parametrize("op", ["distillation_loss", "koleo", "prototype_losses"])
@pytest.mark.parametrize("device", DEVICES)
def test_losses(op: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    n, k, d = shape
    loss_case(op, n // 2 * 2, k, d).check(dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("device", "n", "k", "d"), [("cpu", 20, 4096, 16), pytest.param("cuda", 640, 131072, 256, marks=GPU)]
)
def test_losses_of_batch_64(device: str, n: int, k: int, d: int, dtype: torch.dtype) -> None:
    """The rows and prototypes of a step of 64 images, in the chunks that they take."""
    needs_memory(24, device)
    loss_case("prototype_losses", n, k, d, near=True).check(dtype, device, exact_on=device)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_a_device_that_is_not_the_current_one() -> None:
    groups = [5, 7, 9, 3]
    cases = [tokens_case("embed_tokens", 64), tokens_case("mask_tokens", 64), add_norm_case(64, groups)]
    cases += [stream_case(op, 64, groups) for op in ("sequence_norm", "sequence_add")]
    cases += [gelu_case(37, 300), loss_case("prototype_losses", 12, 200, 24), query_case([4, 19, 5, 3], [12, 1])]
    with torch.cuda.device(0):
        for case in cases:
            case.check(torch.float32, "cuda:1")
        assert torch.cuda.current_device() == 0
