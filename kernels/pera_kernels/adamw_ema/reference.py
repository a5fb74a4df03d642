"""Definition of the update in plain PyTorch: gradient norm, AdamW, EMA, copies; skipped if a number is not finite."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NORM, OK, MULTIPLIER, INFINITE = range(4)  # places in what `prepare` returns


@dataclass
class Slot:
    """All tensors of one parameter. All float32, dense, of the parameter's shape, on one device.

    Attributes:
        param: the student's parameter, or a parameter without a teacher.
        exp_avg, exp_avg_sq: AdamW's moments; None: the parameter gets no gradient and only its teacher moves.
        step: updates made, float32 []; None with the moments.
        teacher: the parameter's moving average; None: it has none.
        copy, teacher_copy: bf16 or fp16 copies of `param` and `teacher` that the update writes; None: there are none.
    """

    param: Tensor
    exp_avg: Tensor | None = None
    exp_avg_sq: Tensor | None = None
    step: Tensor | None = None
    teacher: Tensor | None = None
    copy: Tensor | None = None
    teacher_copy: Tensor | None = None

    def addresses(self) -> list[int]:
        """Row of the kernels' table: where the tensors lie (0: there is none), number of elements."""
        moments = self.exp_avg, self.exp_avg_sq
        tensors = (self.param, *moments, self.teacher, self.copy, self.teacher_copy, self.step)
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors] + [self.param.numel()]


def prepare(
    slots: Sequence[Slot],
    gradients: Sequence[Tensor | None],  # of each slot
    losses: Tensor,  # f32 [any]
    clip: float,
    grad_scale: Tensor | None,  # f32 [], what the gradients were multiplied by
    factor: float,
) -> Tensor:
    """Norm of the gradients, whether the update is made, and the steps counted: f32 [4], see `AdamWEma.prepare`."""
    given = [g for g in gradients if g is not None]
    scale = factor if grad_scale is None else factor / grad_scale
    squares = torch.stack([g.square().sum() for g in given]).sum() if given else losses.new_zeros(())
    norm = squares.sqrt() * scale
    ok = torch.isfinite(losses).all() & torch.isfinite(norm)
    multiplier = scale / ((norm + 1e-6) / clip).clamp(min=1)
    for slot, gradient in zip(slots, gradients, strict=True):
        if gradient is not None and slot.step is not None:
            slot.step += ok.to(slot.step)
    return torch.stack([norm, ok.to(norm), multiplier, (~torch.isfinite(norm)).to(norm)])


def apply(
    slots: Sequence[Slot],
    gradients: Sequence[Tensor | None],
    scalars: Tensor,  # f32 [4]
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    momentum: float,
) -> None:
    """AdamW with decoupled decay, then the EMA with the updated parameters, then the copies; all selected by `ok`."""
    ok = scalars[OK] > 0
    for slot, gradient in zip(slots, gradients, strict=True):
        new = slot.param
        if gradient is not None:
            assert slot.exp_avg is not None
            assert slot.exp_avg_sq is not None
            assert slot.step is not None
            g = gradient * scalars[MULTIPLIER]
            exp_avg = slot.exp_avg.lerp(g, 1 - betas[0])
            exp_avg_sq = betas[1] * slot.exp_avg_sq + (1 - betas[1]) * g * g
            step = slot.step.double()
            correction1, correction2 = (1 - beta**step for beta in betas)
            denominator = exp_avg_sq.sqrt() / correction2.sqrt().to(g.dtype) + eps
            new = slot.param - lr * weight_decay * slot.param
            new = new - (lr / correction1).to(g.dtype) * exp_avg / denominator
            _select(ok, slot.exp_avg, exp_avg)
            _select(ok, slot.exp_avg_sq, exp_avg_sq)
            _select(ok, slot.param, new)
        if slot.copy is not None:
            _select(ok, slot.copy, new)
        if slot.teacher is not None:
            teacher = slot.teacher.lerp(new, 1 - momentum)
            _select(ok, slot.teacher, teacher)
            if slot.teacher_copy is not None:
                _select(ok, slot.teacher_copy, teacher)


def _select(ok: Tensor, old: Tensor, new: Tensor) -> None:
    """Writes `new` where `ok`: a product with 0 would keep a NaN."""
    old.copy_(torch.where(ok, new.to(old.dtype), old))
