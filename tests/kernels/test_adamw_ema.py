"""The fused update against torch's AdamW and lerp in float64."""

import math
import weakref
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from implementations import why_not, with_threads
from torch import Tensor

from pera_kernels import backend
from pera_kernels.adamw_ema import AdamWEma, Slot

SIZES = [(96, 64), (1,), (7, 3), (5000,), (0, 4), (5, 8191), (16,)]  # the largest takes several chunks
BETAS, EPS, CLIP = (0.9, 0.999), 2e-5, 3.0
VALUES = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.97}
FINE = torch.tensor([1.0, -2.0, 3.0])
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(
    params=[
        pytest.param(("reference", "cpu"), id="reference"),
        pytest.param(("native", "cpu"), id="native"),
        pytest.param(("triton", "cpu"), id="triton"),
        pytest.param(("reference", "cuda"), marks=GPU, id="reference-cuda"),
        pytest.param(("triton", "cuda"), marks=GPU, id="triton-cuda"),
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    name, kind = request.param
    with backend.use(name):
        try:
            backend.choose("adamw_ema", torch.device(kind))
        except RuntimeError as reason:
            pytest.skip(str(reason))
        yield torch.device(kind)


def numbers(seed: int, device: torch.device, scale: float = 1.0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(size, generator=rng)).to(device) for size in SIZES]


def make_slots(device: torch.device, copy: torch.dtype | None = torch.float16) -> list[Slot]:
    """Parameters with and without teachers, copies and gradients."""
    params, teachers = numbers(0, device), numbers(1, device)
    slots = []
    for number, (param, teacher) in enumerate(zip(params, teachers, strict=True)):
        slot = Slot(param, torch.zeros_like(param), torch.zeros_like(param), torch.zeros((), device=device))
        if number != 2:
            slot.teacher = teacher
        if copy is not None and number in (0, 3, 5):
            slot.copy, slot.teacher_copy = param.to(copy), teacher.to(copy)
        slots.append(slot)
    slots[6].exp_avg = slots[6].exp_avg_sq = slots[6].step = None
    return slots


def expected(device: torch.device, steps: list[list[Tensor]], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """What torch's AdamW with clipping, and a lerp, make of the same numbers."""
    slots = make_slots(device, None)
    params = [torch.nn.Parameter(slot.param.to(dtype)) for slot in slots]
    trained = params[:6]
    optimizer = torch.optim.AdamW(trained, lr=VALUES["lr"], betas=BETAS, eps=EPS, weight_decay=VALUES["weight_decay"])
    teachers = [None if slot.teacher is None else slot.teacher.to(dtype) for slot in slots]
    for gradients in steps:
        for param, gradient in zip(trained, gradients, strict=False):
            param.grad = gradient.to(dtype)
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        for teacher, param in zip(teachers, params, strict=True):
            if teacher is not None:
                teacher.lerp_(param.detach(), 1 - VALUES["momentum"])
    found = []
    for param, teacher in zip(params, teachers, strict=True):
        state: Any = optimizer.state.get(param, {})
        found.append(
            {"param": param.detach(), "teacher": teacher, **{k: state.get(k) for k in ("exp_avg", "exp_avg_sq")}}
        )
    return found


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value."""
    return 0.0 if want.numel() == 0 else ((got.double() - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize("size", [10.0, 1e-4])
def test_is_adamw_then_lerp(device: torch.device, size: float) -> None:
    steps = [numbers(2 + k, device, size) for k in range(3)]
    slots = make_slots(device)
    update = AdamWEma(slots, BETAS, EPS)
    for gradients in steps:
        norm, ok, *_ = update.prepare(gradients, FINE.to(device), CLIP).tolist()
        assert ok == 1
        want = math.sqrt(sum(g.double().square().sum().item() for g in gradients[:6]))
        assert norm == pytest.approx(want, rel=1e-5)
        update.apply(**VALUES)
    exact, single = (expected(device, steps, dtype) for dtype in (torch.float64, torch.float32))
    for slot, want, torchs in zip(slots, exact, single, strict=True):
        for name, value in want.items():
            got = getattr(slot, name)
            if value is not None and got is not None:
                assert error(got, value) <= 3 * error(torchs[name], value) + 2e-7, name
        assert slot.step is None or not slot.param.numel() or slot.step.item() == 3
        if slot.copy is not None and slot.teacher_copy is not None:
            assert torch.equal(slot.copy, slot.param.half())
            assert slot.teacher is not None
            assert torch.equal(slot.teacher_copy, slot.teacher.half())


def test_a_parameter_without_gradient_only_moves_its_teacher(device: torch.device) -> None:
    slots = make_slots(device)
    before = [slot.param.clone() for slot in slots]
    update = AdamWEma(slots, BETAS, EPS)
    gradients: list[Tensor | None] = [None, *numbers(2, device)[1:]]
    update.prepare(gradients, FINE.to(device), CLIP)
    teacher = slots[0].teacher
    assert teacher is not None
    want = teacher.double().lerp(before[0].double(), 1 - VALUES["momentum"])
    update.apply(**VALUES)
    for number in (0, 6):
        assert torch.equal(slots[number].param, before[number])
    assert slots[0].step is not None
    assert slots[0].step.item() == 0
    assert error(slots[0].teacher, want) < 2e-7
    assert not torch.equal(slots[1].param, before[1])


@pytest.mark.parametrize("where", ["losses", "gradients"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_changes_nothing(device: torch.device, where: str, value: float) -> None:
    slots = make_slots(device)
    update = AdamWEma(slots, BETAS, EPS)
    update.prepare(numbers(2, device), FINE.to(device), CLIP)
    update.apply(**VALUES)
    assert slots[1].exp_avg is not None
    slots[1].exp_avg.fill_(math.nan)  # what is there stays, whatever it is
    before = snapshot(slots)
    losses, gradients = FINE.to(device).clone(), numbers(3, device)
    if where == "losses":
        losses[1] = value
    else:
        gradients[3][4321] = value
    found = update.prepare(gradients, losses, CLIP).tolist()
    assert found[1] == 0
    assert found[3] == (where == "gradients")
    update.apply(**VALUES)
    for a, b in zip(before, snapshot(slots), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def snapshot(slots: list[Slot]) -> list[Tensor]:
    tensors = [getattr(slot, f.name) for slot in slots for f in fields(Slot)]
    return [tensor.detach().clone().reshape(-1) for tensor in tensors if tensor is not None]


def test_scale_and_factor_are_taken_out(device: torch.device) -> None:
    results = []
    for scale, factor in ((None, 1.0), (1024.0, 4.0)):
        slots = make_slots(device)
        update = AdamWEma(slots, BETAS, EPS)
        multiplied = 1.0 if scale is None else scale / factor
        gradients = [g * multiplied for g in numbers(2, device)]
        told = None if scale is None else torch.tensor(scale, device=device)
        norm = update.prepare(gradients, FINE.to(device), CLIP, told, factor)[0].item()
        update.apply(**VALUES)
        results.append((norm, snapshot(slots)))
    assert results[0][0] == results[1][0]  # both are powers of two
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_gradients_may_move_and_lie_anywhere(device: torch.device) -> None:
    results = []
    for offset in (0, 1):
        slots = make_slots(device)
        update = AdamWEma(slots, BETAS, EPS)
        for seed in (2, 3):
            gradients = []
            for g in numbers(seed, device):
                room = torch.empty(g.numel() + offset, device=device)
                gradients.append(room[offset:].view(g.shape).copy_(g))
            update.prepare(gradients, FINE.to(device), CLIP)
            update.apply(**VALUES)
        results.append(snapshot(slots))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # the norm is summed in another order


def test_gradients_are_not_kept_alive(device: torch.device) -> None:
    update = AdamWEma(make_slots(device), BETAS, EPS)
    gradients = numbers(2, device)
    seen = weakref.ref(gradients[0])
    update.prepare(gradients, FINE.to(device), CLIP)
    update.apply(**VALUES)
    del gradients
    assert seen() is None
    with pytest.raises(RuntimeError, match="apply without prepare"):
        update.apply(**VALUES)
    assert update.traffic()["sum_squares_kernel"] == sum(4 * math.prod(size) for size in SIZES[:6])


def test_equal_bits_twice(device: torch.device) -> None:
    results = []
    for _ in range(2):
        slots = make_slots(device)
        update = AdamWEma(slots, BETAS, EPS)
        norms = []
        for seed in (2, 3):
            norms.append(update.prepare(numbers(seed, device), FINE.to(device), CLIP).clone())
            update.apply(**VALUES)
        results.append([*norms, *snapshot(slots)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_equal_bits_for_any_number_of_threads() -> None:
    if reason := why_not("adamw_ema", "native"):
        pytest.skip(reason)

    def after_a_step() -> list[Tensor]:
        slots = make_slots(torch.device("cpu"))
        update = AdamWEma(slots, BETAS, EPS)
        norm = update.prepare(numbers(2, torch.device("cpu")), FINE, CLIP).clone()
        update.apply(**VALUES)
        return [norm, *snapshot(slots)]

    with backend.use("native"):
        one, *others = with_threads(after_a_step, 1, 2, 5)
    assert all(torch.equal(a, b) for other in others for a, b in zip(one, other, strict=True))


def test_bad_arguments_are_named() -> None:
    param = torch.zeros(4, 6)
    with pytest.raises(ValueError, match="no parameters"):
        AdamWEma([], BETAS, EPS)
    with pytest.raises(ValueError, match=r"slot 0: teacher is torch.float64 \[4, 6\]"):
        AdamWEma([Slot(param, teacher=param.double())], BETAS, EPS)
    with pytest.raises(ValueError, match="slot 0: copy is not contiguous"):
        AdamWEma([Slot(param, copy=torch.zeros(6, 4, dtype=torch.float16).t())], BETAS, EPS)
    with pytest.raises(ValueError, match="come together"):
        AdamWEma([Slot(param, exp_avg=param)], BETAS, EPS)
    with pytest.raises(ValueError, match="2 gradients for 1 parameters"):
        AdamWEma([Slot(param)], BETAS, EPS).prepare([None, None], FINE, CLIP)
