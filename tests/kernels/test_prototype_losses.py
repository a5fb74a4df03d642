"""pera::prototype_losses against the two losses that it joins: values, gradients, what is in memory."""

import os

import pytest
import torch
from implementations import each_on_cpu
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pera_kernels import backend, products
from pera_kernels.distillation_loss import distillation_loss, weight_norm
from pera_kernels.koleo import koleo
from pera_kernels.prototype_losses import prototype_losses, reference

TEMPS = 0.1, 0.05


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one short; two of them in Triton's interpreter, which takes its time."""
    monkeypatch.setattr(weight_norm, "MIN_CHUNK", 128 if os.environ.get("TRITON_INTERPRET") == "1" else 64)
    monkeypatch.setattr(weight_norm, "CHUNK_ELEMENTS", 64)
    monkeypatch.setattr(weight_norm, "GPU_CHUNK_BYTES", 64)


implementation = each_on_cpu("prototype_losses", ["triton", "native", "chunked"])


def make(n: int = 12, k: int = 200, d: int = 24, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    student = draw(n, d).to(dtype), draw(k, d).to(wide), (draw(k, 1).abs() + 0.5).to(wide)
    teacher = draw(n, d).to(dtype), draw(k, d).to(wide), (draw(k, 1).abs() + 0.5).to(wide)
    return [*(x.requires_grad_() for x in student), *teacher, draw(k).to(wide)]


def evaluate(losses, arguments: list[Tensor], spread_rows: int = 8, num_crops: int = 2) -> list[Tensor]:
    """Both losses and the gradients of a weighted sum of them."""
    entropies, spread = losses(*arguments, *TEMPS, spread_rows, num_crops)
    total = (entropies * torch.linspace(0.5, 1.5, len(entropies), dtype=entropies.dtype)).sum() + 0.7 * spread
    return [entropies.detach(), spread.detach(), *torch.autograd.grad(total, arguments[:3])]


def apart(*arguments) -> tuple[Tensor, Tensor]:
    *both, spread_rows, num_crops = arguments
    student_rows, student_v, student_g = both[:3]
    return distillation_loss(*both), koleo(student_rows[:spread_rows], student_v, student_g, num_crops)


def wide(arguments: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_(x.requires_grad) for x in arguments]


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("shape", [(12, 200, 24), (8, 131, 7), (9, 64, 40)], ids=str)
def test_equals_reference_in_float64(shape: tuple[int, int, int]) -> None:
    arguments = make(*shape, dtype=torch.float64)
    wanted = evaluate(reference.prototype_losses, arguments)
    for got, want in zip(evaluate(prototype_losses, arguments), wanted, strict=True):
        assert error(got, want) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_within_that_of_both_apart(implementation: str, dtype: torch.dtype) -> None:
    if implementation == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bfloat16 arithmetic is wrong")
    arguments = make(dtype=dtype)
    exact = evaluate(reference.prototype_losses, wide(arguments))
    plain = evaluate(apart, arguments)
    names = "entropies", "koleo", "rows", "v", "g"
    for name, got, other, want in zip(names, evaluate(prototype_losses, arguments), plain, exact, strict=True):
        assert got.dtype == other.dtype
        assert got.shape == want.shape
        assert error(got, want) <= 3 * max(error(other, want), torch.finfo(dtype).eps / 8), name


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("power", [0, 16])
def test_near_duplicates_in_float16(implementation: str, power: int) -> None:
    """Weights of 1 / distance^2, times the loss scale, overflow nowhere on the way to gradients that are in range."""
    arguments = make(12, 1000, 24, torch.float16)
    rows = torch.nn.functional.normalize(arguments[0].detach().float())
    rows[1] = rows[0]
    rows = rows.half()
    rows[1, 3] += 2.0**-11
    arguments[0] = rows.requires_grad_()

    def scaled(losses, arguments: list[Tensor], scale: float) -> tuple[Tensor, ...]:
        entropies, spread = losses(*arguments, *TEMPS, 8, 2)
        return torch.autograd.grad(0.1 * (entropies.mean() + spread) * scale, arguments[:3])

    exact = scaled(reference.prototype_losses, wide(arguments), 2.0**power)
    assert exact[0][:2].norm() > 10 * exact[0][2:].norm()  # the near rows have most of the gradient
    plain = scaled(reference.prototype_losses, arguments, 1.0)
    with products.half_products():
        got = scaled(prototype_losses, arguments, 2.0**power)
    for name, a, b, c in zip(("rows", "v", "g"), got, exact, plain, strict=True):
        if name == "rows" and b.abs().max() > torch.finfo(torch.float16).max:
            assert not torch.isfinite(a).all()  # the scaler sees it, and halves the scale
        else:
            assert error(a, b) <= 3 * max(error(c * 2.0**power, b), 2.0**-11), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen(implementation: str, value: float) -> None:
    """KoLeo alone would tell; its neighbour, chosen among NaN, is a row of the crop."""
    for bad in (0, 1):  # a row, a prototype
        arguments = make()
        with torch.no_grad():
            arguments[bad][3, 1] = value
        _, spread = prototype_losses(*arguments, *TEMPS, 8, 2)
        assert not torch.isfinite(spread)
        assert not torch.isfinite(torch.autograd.grad(spread, arguments[0])[0]).all()


def test_without_kernels_for_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that are too large for KoLeo's kernels, beside the kernels of the walk."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter")
    from pera_kernels.koleo import triton

    arguments = make()
    with backend.use("triton"):
        want = evaluate(prototype_losses, arguments)
        monkeypatch.setattr(triton, "MAX_ROWS", 1)
        for got, other in zip(evaluate(prototype_losses, arguments), want, strict=True):
            assert error(got, other.double()) < 1e-5


@pytest.mark.parametrize(("spread_rows", "num_crops"), [(0, 1), (1, 1), (2, 2), (12, 3), (12, 12)])
def test_any_share_of_the_rows(implementation: str, spread_rows: int, num_crops: int) -> None:
    arguments = make()
    wanted = evaluate(apart, arguments, spread_rows, num_crops)
    for got, want in zip(evaluate(prototype_losses, arguments, spread_rows, num_crops), wanted, strict=True):
        assert error(got, want.double()) < 2e-5


def test_each_loss_alone(implementation: str) -> None:
    arguments = make()
    for pick in (0, 1):
        got = torch.autograd.grad(prototype_losses(*arguments, *TEMPS, 8, 2)[pick].sum(), arguments[:3])
        want = torch.autograd.grad(apart(*arguments, *TEMPS, 8, 2)[pick].sum(), arguments[:3])
        for a, b in zip(got, want, strict=True):
            assert error(a, b.double()) < 2e-5


def test_repeats_give_equal_bits(implementation: str) -> None:
    arguments = make()
    for a, b in zip(evaluate(prototype_losses, arguments), evaluate(prototype_losses, arguments), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_opcheck() -> None:
    for arguments in (make(), make(dtype=torch.bfloat16)):
        torch.library.opcheck(torch.ops.pera.prototype_losses, (*arguments, *TEMPS, 8, 2))


def test_compiles_as_one_graph() -> None:
    arguments = make()

    def total(*tensors: Tensor) -> Tensor:
        entropies, spread = prototype_losses(*tensors, *TEMPS, 8, 2)
        return entropies.sum() + spread

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*arguments), arguments[:3])
    for a, b in zip(got, torch.autograd.grad(total(*arguments), arguments[:3]), strict=True):
        assert torch.equal(a, b)


class Made(TorchDispatchMode):
    """The ops that return tensors of a shape, as the autograd engine calls them."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.ops = shape, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        values = out if isinstance(out, (tuple, list)) else [out]
        views = "detach", "view", "alias"
        if any(isinstance(x, Tensor) and tuple(x.shape) == self.shape for x in values):
            self.ops += [name] if (name := func.overloadpacket.__name__) not in views else []
        return out


@pytest.mark.parametrize(
    ("losses", "ops"),
    [
        (prototype_losses, ["prototype_losses_backward"]),
        (apart, ["koleo_backward", "distillation_loss_backward", "add"]),
    ],
)
def test_the_gradient_of_the_prototypes_is_made_once(losses, ops: list[str]) -> None:
    arguments = make(k=401)
    loss = sum(x.sum() for x in losses(*arguments, *TEMPS, 8, 2))
    with Made((401, 24)) as seen:
        loss.backward()
    assert seen.ops == ops


def test_fake_tensors_hold_no_logits() -> None:
    with FakeTensorMode():
        rows = torch.empty(80, 384, dtype=torch.bfloat16, requires_grad=True)
        student = torch.empty(131072, 384, requires_grad=True), torch.empty(131072, 1, requires_grad=True)
        teacher = torch.empty(80, 384, dtype=torch.bfloat16), torch.empty(131072, 384), torch.empty(131072, 1)
        entropies, spread = prototype_losses(rows, *student, *teacher, torch.empty(131072), *TEMPS, 16, 2)
        (entropies.sum() + spread).backward()
        assert student[0].grad is not None
        assert student[0].grad.shape == student[0].shape


def test_bad_arguments() -> None:
    arguments = make()
    with pytest.raises(ValueError, match="spread_rows must be 0 to 12"):
        prototype_losses(*arguments, *TEMPS, 13, 1)
    with pytest.raises(ValueError, match="num_crops must be at least 1 and divide the 8 rows"):
        prototype_losses(*arguments, *TEMPS, 8, 3)
    with pytest.raises(ValueError, match="student_temp must be positive"):
        prototype_losses(*arguments, 0.0, 0.05, 8, 2)
