"""Inputs of one micro-batch: crops, colours, patch indices and kept sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass
class GroupInputs:
    """All crops of one size, crop-major (all images' crop 0, then all images' crop 1, ...).

    Attributes:
        crops: uint8 or uint16 [N, H, W, C], or float [N, C, H, W] views that are coloured and normalised already.
        student_index: int32 [N, n], ascending patch numbers that the student sees.
        predicted_index: int32 [N, n], patches between; used for global crops only.
        teacher_index: int32 [N, n], patches that the teacher sees.
        student_order, teacher_order: int32 [N, 4], colour steps; None for float views.
        student_factors, teacher_factors: float32 [N, 4]; None for float views.
        teacher_crops: the teacher's own float views; None: the same crops as the student's.
    """

    crops: Tensor
    student_index: Tensor
    predicted_index: Tensor
    teacher_index: Tensor
    student_order: Tensor | None = None
    student_factors: Tensor | None = None
    teacher_order: Tensor | None = None
    teacher_factors: Tensor | None = None
    teacher_crops: Tensor | None = None

    def apply(self, fn: Callable[[Tensor], Tensor]) -> GroupInputs:
        """fn on every tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: fn(value) for name, value in values.items() if value is not None})


@dataclass
class StepInputs:
    """One micro-batch.

    Attributes:
        global_: the global crops.
        local: the local crops; N may be 0.
        keep: int32 [depth, 2, kept global + kept local], the sequences that go through the attention (0) and the
            MLP branch (1) of each block, counted within their group; None without stochastic depth.
        places: int32 [depth, 2, global + local sequences], each sequence's place in keep or -1, see
            ``packing.places``; None: made from keep where it is needed, in several launches.
    """

    global_: GroupInputs
    local: GroupInputs
    keep: Tensor | None = None
    places: Tensor | None = None

    def apply(self, fn: Callable[[Tensor], Tensor]) -> StepInputs:
        """fn on every tensor."""
        numbers = (None if tensor is None else fn(tensor) for tensor in (self.keep, self.places))
        return StepInputs(self.global_.apply(fn), self.local.apply(fn), *numbers)

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of ``apply``."""
        found: list[Tensor] = []

        def take(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.apply(take)
        return found

    def to(self, device: torch.device, non_blocking: bool = True) -> StepInputs:
        """All tensors on a device."""
        return self.apply(lambda tensor: tensor.to(device, non_blocking=non_blocking))


def num_kept(sequences: int, drop_path: float) -> int:
    """Sequences of a group that go through a residual branch (docs/method.md section 4.4)."""
    return max(int(sequences * (1 - drop_path)), 1) if sequences else 0
