"""The interface of the update: checks and keeps the tensors, and chooses an implementation."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .. import backend, cost
from ..launching import device_of
from . import native, reference
from .reference import Slot

backend.register("adamw_ema", "triton", available=backend.needs_triton)
backend.register("adamw_ema", "native", available=backend.needs_native("adamw_ema_prepare", "adamw_ema_apply"))


class AdamWEma:
    """AdamW and EMA over fixed tensors, in two calls a step; on a GPU the host waits for neither.

    Between them the caller may use what `prepare` found out, and the parameters are still the old ones.

    Args:
        slots: one for each parameter. They are kept, and must not move: a new optimiser state wants a new object.
        betas, eps: of AdamW.

    Raises:
        ValueError: a tensor has the wrong dtype, shape, device or strides, or there is no slot.
    """

    def __init__(self, slots: Sequence[Slot], betas: tuple[float, float], eps: float):
        if not slots:
            raise ValueError("AdamWEma: no parameters")
        self.slots, self._betas, self._eps = list(slots), betas, eps
        self._device = self.slots[0].param.device
        self._copy_dtype: torch.dtype | None = None
        for number, slot in enumerate(self.slots):
            self._check(number, slot)
        self._gradients: list[Tensor | None] = []  # between `prepare` and `apply`: they live no longer for it
        self._taken: list[bool] = []  # whether each slot had one
        self._scalars = torch.zeros(4, device=self._device)
        self._table: Any = None  # of kernels

    def _check(self, number: int, slot: Slot) -> None:
        singles = {"exp_avg": slot.exp_avg, "exp_avg_sq": slot.exp_avg_sq, "teacher": slot.teacher}
        moments = [tensor is None for tensor in (slot.exp_avg, slot.exp_avg_sq, slot.step)]
        if any(moments) and not all(moments):
            raise ValueError(f"AdamWEma: slot {number}: exp_avg, exp_avg_sq and step come together")
        for name, tensor in {"param": slot.param, **singles}.items():
            _check_one(f"slot {number}: {name}", tensor, slot.param, torch.float32)
        for name, tensor in {"copy": slot.copy, "teacher_copy": slot.teacher_copy}.items():
            if tensor is not None:
                if tensor.dtype not in (torch.bfloat16, torch.float16):
                    raise ValueError(f"AdamWEma: slot {number}: {name} is {tensor.dtype}, wants bfloat16 or float16")
                self._copy_dtype = self._copy_dtype or tensor.dtype
                _check_one(f"slot {number}: {name}", tensor, slot.param, self._copy_dtype)

    def prepare(
        self,
        gradients: Sequence[Tensor | None],  # of each slot, f32; None or no moments: AdamW leaves the parameter alone
        losses: Tensor,  # f32 [any], contiguous: the update is skipped unless all are finite
        clip: float,
        grad_scale: Tensor | None = None,  # f32 [], what the gradients were multiplied by (GradScaler)
        factor: float = 1.0,  # what they are to be multiplied by, besides
    ) -> Tensor:
        """Takes the gradients for the next `apply`, and counts the step if there will be one.

        Returns:
            f32 [4] on the device, overwritten by the next call: norm of the gradients before clipping; 1 if the update
            is made, else 0; what `apply` multiplies the gradients by; 1 if the norm is not finite, else 0.
        """
        if len(gradients) != len(self.slots):
            raise ValueError(f"AdamWEma: {len(gradients)} gradients for {len(self.slots)} parameters")
        self._gradients = [
            g if slot.exp_avg is not None else None for slot, g in zip(self.slots, gradients, strict=True)
        ]
        self._taken = [g is not None for g in self._gradients]
        for number, (slot, gradient) in enumerate(zip(self.slots, self._gradients, strict=True)):
            _check_one(f"gradient {number}", gradient, slot.param, torch.float32)
        if losses.dtype != torch.float32 or losses.dim() != 1 or not losses.is_contiguous():
            raise ValueError(
                f"AdamWEma: losses are {losses.dtype} {list(losses.shape)}, want float32 [any], contiguous"
            )
        with torch.no_grad(), self._place():
            if not self._in_kernels():
                self._scalars = reference.prepare(self.slots, self._gradients, losses, clip, grad_scale, factor)
            else:
                self._table.point(self._gradients)
                self._scalars = self._table.prepare(losses, clip, grad_scale, factor)
        return self._scalars

    def apply(self, lr: float, weight_decay: float, momentum: float) -> None:
        """Make the update that `prepare` allowed, once.

        AdamW, then teacher = momentum * teacher + (1 - momentum) * param.

        Args:
            lr, weight_decay: of AdamW at this step.
            momentum: of the EMA.

        Raises:
            RuntimeError: no `prepare` since the last one: its gradients may be gone.
        """
        if not self._gradients:
            raise RuntimeError("AdamWEma: apply without prepare")
        values = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eps": self._eps}
        with torch.no_grad(), self._place():
            if not self._in_kernels():
                reference.apply(self.slots, self._gradients, self._scalars, betas=self._betas, **values)
            else:
                self._table.apply(**values)
        self._gradients = []

    def traffic(self) -> dict[str, int]:
        """Bytes that the kernels of the last `prepare` and an `apply` read and write, by the kernel's name."""
        taken = [slot for slot, has in zip(self.slots, self._taken, strict=True) if has]
        trained = sum(2 * cost.size(slot.param, slot.exp_avg, slot.exp_avg_sq) for slot in taken)
        copied = sum(cost.size(slot.copy, slot.teacher_copy) + 2 * cost.size(slot.teacher) for slot in self.slots)
        gradients = sum(cost.size(slot.param) for slot in taken)  # as large as their parameters
        return {"sum_squares_kernel": gradients, "adamw_ema_kernel": gradients + trained + copied}

    def _place(self) -> AbstractContextManager[object]:
        return device_of(self.slots[0].param)

    def _in_kernels(self) -> bool:
        name = backend.choose("adamw_ema", self._device)
        if name == "reference":
            return False
        if self._table is None and name == "triton":
            from . import triton

            self._table = triton.Table(self.slots, self._device, self._copy_dtype, self._betas)
        elif self._table is None:
            self._table = native.Table(self.slots, self._copy_dtype, self._betas)
        return True


def _check_one(what: str, tensor: Tensor | None, param: Tensor, dtype: torch.dtype) -> None:
    """Kernels walk over memory: whatever the order of the dimensions is, it must be the parameter's."""
    if tensor is None:
        return
    if tensor.dtype != dtype or tensor.shape != param.shape or tensor.device != param.device:
        raise ValueError(
            f"AdamWEma: {what} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, wants {dtype}"
            f" {list(param.shape)} on {param.device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"AdamWEma: {what} is not contiguous")
