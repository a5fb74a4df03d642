"""The update by one op: gradient norm, clipping, AdamW, EMA and center; on a GPU without a wait of the host.

What is not finite is found on the device, and the update, which changes nothing then, is launched all the same.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pera_fast.model.pera import PerA
from pera_fast.train.compute_copies import copy_of
from pera_fast.train.schedules import StepValues
from pera_kernels import backend
from pera_kernels.adamw_ema import AdamWEma, Slot


@dataclass
class FusedUpdate:
    """AdamW's state lies in the optimizer, as ever: a checkpoint holds the same.

    Attributes:
        model: with center and teacher.
        optimizer: AdamW with one group.
        scaler: of fp16's gradients.
    """

    model: PerA
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    _pass: AdamWEma | None = field(default=None, init=False)
    _parameters: list[Tensor] = field(default_factory=list, init=False)

    def __call__(self, losses: Tensor, teacher_mean: Tensor, values: StepValues, clip: float) -> tuple[Tensor, Tensor]:
        """Launch the update of a step.

        Args:
            losses: float32 [any], contiguous: nothing is changed unless all are finite.
            teacher_mean: float32 [bottleneck], mean teacher row, for the center.
            values: of the step.
            clip: largest norm of the gradients.

        Returns:
            (norm before clipping, 1 if the update was made, else 0), float32 [] on the device.
        """
        if self._pass is None:
            self._pass = self._make()
        group: dict[str, Any] = self.optimizer.param_groups[0]
        group["lr"], group["weight_decay"] = values.lr, values.weight_decay
        scale = self.scaler._scale if self.scaler.is_enabled() else None
        found = self._pass.prepare([p.grad for p in self._parameters], losses, clip, scale)
        norm, ok, _, infinite = found.clone().unbind()
        self.model.update_center(teacher_mean, ok > 0)  # before the teacher's weights move
        self._pass.apply(values.lr, values.weight_decay, values.momentum)
        self.model.refresh_fp8()
        if scale is not None:
            s: Any = self.scaler
            torch._amp_update_scale_(
                scale, s._growth_tracker, infinite, s._growth_factor, s._backoff_factor, s._growth_interval
            )
        return norm, ok

    def forget(self) -> None:
        """Look the optimizer's state up again at the next step: it was replaced."""
        self._pass = None

    def traffic(self) -> dict[str, int]:
        """Bytes that kernels which know tensors by addresses read and write in an update, by the kernel's name."""
        fp8 = self.model.fp8_copies
        return {**(self._pass.traffic() if self._pass else {}), **(fp8.traffic() if fp8 else {})}

    def _make(self) -> AdamWEma:
        group: dict[str, Any] = self.optimizer.param_groups[0]
        student, teacher = self.model.student.parameters(), self.model.teacher.parameters()
        twins = {id(s): t for s, t in zip(student, teacher, strict=True)}
        self._parameters = list(group["params"])
        slots = [self._slot(p, twins.get(id(p))) for p in self._parameters]
        return AdamWEma(slots, group["betas"], group["eps"])

    def _slot(self, parameter: Tensor, teacher: Tensor | None) -> Slot:
        state = self.optimizer.state[parameter]
        if not state and parameter.grad is not None:  # as AdamW itself begins
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        moments = (state["exp_avg"], state["exp_avg_sq"], state["step"]) if state else (None, None, None)
        copies = copy_of(parameter), None if teacher is None else copy_of(teacher)
        return Slot(parameter.detach(), *moments, None if teacher is None else teacher.detach(), *copies)


def make_update(model: PerA, optimizer: torch.optim.AdamW, scaler: torch.amp.GradScaler) -> FusedUpdate | None:
    """The update for a model where kernels of `adamw_ema` run; None elsewhere."""
    device = next(model.parameters()).device
    return None if backend.choose("adamw_ema", device) == "reference" else FusedUpdate(model, optimizer, scaler)
