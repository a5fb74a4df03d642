"""`pixel_loss`: value and gradient against the float64 reference and its autograd."""

import os
from collections.abc import Iterator
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import each_on_cpu, runs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pera_kernels import backend
from pera_kernels.pixel_loss import eager, pixel_loss
from pera_kernels.pixel_loss import reference as definition
from pera_kernels.pixel_loss.op import pixel_loss_backward
from pera_kernels.visible_patches import eager as patches
from pera_kernels.visible_patches.arguments import Patches
from pera_kernels.visible_patches.reference import compute_dtype

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IMPLEMENTATIONS = ["reference", "eager", "native", *(["triton"] if INTERPRETED else [])]
ORDERS = [*permutations(range(4)), (4, -1, -1, -1), (-1, -1, -1, -1)]


implementation = each_on_cpu("pixel_loss", IMPLEMENTATIONS)


def runnable() -> Iterator[str]:
    """Implementations that run here; the fixture's skips say why the others do not."""
    return (name for name in IMPLEMENTATIONS if runs("pixel_loss", name))


def make_case(count: int = 6, seen: int = 4, size: int = 4, channels: int = 3, seed: int = 0) -> tuple[Tensor, tuple]:
    """Predictions (float64) of crops of 3 x 2 patches, and the other arguments."""
    random = torch.Generator().manual_seed(seed)
    crops = torch.randint(0, 256, (count, 3 * size, 2 * size, channels), dtype=torch.uint8, generator=random)
    index = torch.randint(0, 6, (count, seen), dtype=torch.int32, generator=random)
    order = torch.tensor([ORDERS[(5 * i + seed) % len(ORDERS)] for i in range(count)], dtype=torch.int32).view(-1, 4)
    low, span = torch.tensor([0.6, 0.6, 0.8, -0.1]), torch.tensor([0.8, 0.8, 0.4, 0.2])
    factors = low + span * torch.rand(count, 4, generator=random)
    pred = torch.randn(count * seen, size * size * channels, dtype=torch.float64, generator=random)
    return pred, (crops, index, order, factors, None, [0.4, 0.5, 0.6, 0.7][:channels], [0.3] * channels, size)


def run(function, pred: Tensor, where: tuple, upstream: float = 1.7) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient for `pred` under an upstream gradient that is not 1."""
    leaf = pred.clone().requires_grad_()
    loss = function(leaf, *where)
    (loss * upstream).backward()
    return loss.detach(), leaf.grad


def check(pred: Tensor, where: tuple, dtype: torch.dtype) -> None:
    """Value and gradient of the op in `dtype` against float64: three times the error that plain autograd makes in it.

    The error of float64, in which the definition itself is computed, is that of float32 in units of the last place.
    Plain autograd may be right by luck where there are few values, so anyone's target may be off by what two roundings
    of a pixel in [0, 1] are after the division by std.
    """
    pred = pred.to(dtype)
    results = run(pixel_loss, pred, where)
    rights = run(definition.pixel_loss, pred.double(), where)
    plain_dtype = torch.float32 if dtype == torch.float64 else dtype
    plains = run(definition.pixel_loss, pred.to(plain_dtype), where)
    assert results[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert results[0].shape == ()
    assert results[1].dtype == dtype
    difference = definition.difference(pred.double(), Patches(*where))
    off = torch.finfo(compute_dtype(dtype)).eps / min(where[6], default=1)
    slacks = 2 * difference.abs().sum() / max(len(pred), 1) * off, 1.7 * 2 / max(len(pred), 1) * off
    for result, right, plain, slack in zip(results, rights, plains, slacks, strict=True):
        assert result.shape == right.shape
        if right.numel() == 0:
            continue
        precision = torch.finfo(result.dtype).eps
        error = (plain.double() - right).abs().max() * precision / torch.finfo(plain.dtype).eps
        allowed = 3 * error + precision * right.abs().max() + slack
        assert allowed < 0.03 * right.abs().max() + 1e-30
        assert (result.double() - right).abs().max() <= allowed


def test_the_definition_by_hand() -> None:
    """One crop, two patches of 1x2... written out: order (row, column, channel), sum over values, mean over rows."""
    crops = torch.arange(2 * 4 * 3, dtype=torch.uint8).view(1, 2, 4, 3)
    where = (crops, torch.tensor([[1, 0]]), None, None, None, [0.0] * 3, [1 / 255] * 3, 2)
    right_patch = [6, 7, 8, 9, 10, 11, 18, 19, 20, 21, 22, 23]
    left_patch = [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17]
    target = torch.tensor([right_patch, left_patch], dtype=torch.float64)
    offset = torch.zeros(2, 12, dtype=torch.float64)
    offset[0, 3], offset[1, 0], offset[1, 11] = 2, 3, -1
    for name in runnable():
        with backend.use(name):
            torch.testing.assert_close(pixel_loss(target + offset, *where).item(), (4 + 9 + 1) / 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_value_and_gradient(implementation: str, dtype: torch.dtype) -> None:
    check(*make_case(count=6 if INTERPRETED else len(ORDERS)), dtype)


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_whole_words(implementation: str, size: int, dtype: torch.dtype) -> None:
    """Sides that are multiples of 8: kernels may take several pixels at once."""
    check(*make_case(count=2, seen=5, size=size), dtype)


@given(
    count=st.integers(0, 3),
    seen=st.integers(0, 5),
    size=st.integers(1, 9),
    channels=st.integers(1, 4),
    seed=st.integers(0, 50),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(count: int, seen: int, size: int, channels: int, seed: int, dtype: torch.dtype) -> None:
    for name in runnable():
        with backend.use(name):
            check(*make_case(count, seen, size, channels, seed), dtype)


@pytest.mark.parametrize(("count", "seen"), [(0, 4), (3, 0), (0, 0)])
def test_no_rows_give_zero(implementation: str, count: int, seen: int) -> None:
    loss, grad = run(pixel_loss, *make_case(count, seen))
    assert loss.item() == 0
    assert grad.shape == (0, 48)


def test_gradcheck(implementation: str) -> None:
    pred, where = make_case(count=2, seen=2, size=2)
    pred.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: pixel_loss(p, *where), pred)
    assert torch.autograd.gradcheck(lambda p: definition.pixel_loss(p, *where), pred)


def test_strides_and_float_views(implementation: str) -> None:
    pred, where = make_case()
    right = run(pixel_loss, pred, where)
    strided = pred.t().contiguous().t()
    leaf = strided.detach().requires_grad_()
    pixel_loss(leaf, *where).mul(1.7).backward()
    torch.testing.assert_close(leaf.grad, right[1])
    views = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    index = torch.tensor([[5, 0, 2], [3, 5, 5]])
    check(torch.zeros(6, 48, dtype=torch.float64), (views, index, None, None, None, [], [], 4), torch.float32)


def test_only_asked_gradients(implementation: str) -> None:
    pred, where = make_case()
    assert not pixel_loss(pred, *where).requires_grad


class Largest(TorchDispatchMode):
    """The most floating-point elements that one ATen op newly returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point() and not func.is_view:
            self.largest = max(self.largest, result.numel())
        return result


def test_the_target_is_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    pred, where = make_case(count=20, seen=6)
    monkeypatch.setattr(patches, "CACHE_VALUES", 10 * 48)
    means = patches.contrast_mean(*where[:1], *where[2:4])
    where = (*where[:4], means, *where[5:])
    pred = pred.float()
    with Largest() as calls:
        loss = eager.pixel_loss(pred, Patches(*where))
    assert 0 < calls.largest <= 10 * 48
    torch.testing.assert_close(loss, definition.pixel_loss(pred, *where))
    grad = eager.pixel_loss_backward(torch.tensor(1.7), pred, Patches(*where))
    torch.testing.assert_close(grad, run(definition.pixel_loss, pred, where)[1])


def test_repeats_give_equal_bits(implementation: str) -> None:
    pred, where = make_case(count=6 if INTERPRETED else 20)
    first, second = (run(pixel_loss, pred.float(), where) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_native_gives_equal_bits_with_any_number_of_threads() -> None:
    if "native" not in runnable():
        pytest.skip("the native library is not built")
    pred, where = make_case(count=30, seen=6)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with backend.use("native"):
                results.append(run(pixel_loss, pred.float(), where))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_python_implementation_takes_fake_tensors() -> None:
    pred, where = make_case()
    pred, grad = pred.float(), torch.tensor(1.0)
    with FakeTensorMode() as mode:
        grad, *fakes = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in (grad, pred, *where)]
        assert pixel_loss._init_fn(*fakes).shape == ()
        assert pixel_loss_backward._init_fn(grad, *fakes).shape == pred.shape


def test_every_gradient_is_written(implementation: str) -> None:
    pred, where = make_case()
    torch.use_deterministic_algorithms(True)
    try:
        assert run(pixel_loss, pred.float(), where)[1].isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("size", [5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(size: int, dtype: torch.dtype) -> None:
    """Value and gradient, without waiting for the device, twice the same bits."""
    pred, where = make_case(count=len(ORDERS), size=size)
    pred, where = pred.cuda(), tuple(value.cuda() if isinstance(value, Tensor) else value for value in where)
    check(pred, where, dtype)
    torch.cuda.set_sync_debug_mode("error")
    try:
        (loss, grad), second = (run(pixel_loss, pred.to(dtype), where) for _ in range(2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(loss, second[0])
    assert torch.equal(grad, second[1])


def test_opcheck(implementation: str) -> None:
    pred, where = make_case(count=3, seen=2)
    torch.library.opcheck(torch.ops.pera.pixel_loss, (pred.float().requires_grad_(), *where))
    torch.library.opcheck(
        torch.ops.pera.pixel_loss, (pred.bfloat16(), where[0], where[1], None, None, None, *where[5:])
    )
    torch.library.opcheck(torch.ops.pera.pixel_loss_backward, (torch.tensor(1.5), pred.float(), *where))


def test_compiles_without_a_break(implementation: str) -> None:
    pred, where = make_case()
    compiled = torch.compile(lambda p, *w: pixel_loss(p, *w) * 3, fullgraph=True, backend="aot_eager")
    result, right = run(compiled, pred, where), run(lambda p, *w: pixel_loss(p, *w) * 3, pred, where)
    assert torch.equal(result[0], right[0])
    assert torch.equal(result[1], right[1])


def test_fake_tensors_of_more_than_int32_elements() -> None:
    with FakeTensorMode():
        crops = torch.empty(20000, 448, 448, 3, dtype=torch.uint8)
        index = torch.empty(20000, 157, dtype=torch.int32)
        pred = torch.empty(20000 * 157, 768, dtype=torch.bfloat16, requires_grad=True)
        loss = pixel_loss(pred, crops, index, None, None, None, [0.5] * 3, [0.5] * 3, 16)
        loss.backward()
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert pred.grad.shape == pred.shape
    assert pred.numel() > 2**31


def test_bad_arguments_are_named(implementation: str) -> None:
    pred, where = make_case()
    crops, index = where[:2]
    with pytest.raises(ValueError, match=r"pred must be \[24, 48\]"):
        pixel_loss(pred[:-1], *where)
    with pytest.raises(TypeError, match="pred must be floating"):
        pixel_loss(pred.int(), *where)
    with pytest.raises(ValueError, match="index must be in"):
        pixel_loss(pred, crops, index + 6, *where[2:])
    with pytest.raises(ValueError, match="order and factors"):
        pixel_loss(pred, crops, index, None, *where[3:])
    with pytest.raises(ValueError, match="whole patches"):
        pixel_loss(pred, *where[:-1], 5)
