"""Named tuples of the arguments of `distillation_loss` and of what its forward saves, for code below the op."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Network(NamedTuple):
    """A network's side of the loss: bottleneck rows and weight-normalised prototypes."""

    rows: Tensor  # [N, d]
    v: Tensor  # [K, d]
    g: Tensor  # [K, 1]


class Arguments(NamedTuple):
    """Arguments of `distillation_loss`: see there."""

    student: Network
    teacher: Network
    center: Tensor  # [K]
    student_temp: float
    teacher_temp: float

    @staticmethod
    def of(*values: Any) -> Arguments:
        """Build from the op's nine arguments, in their order."""
        *tensors, student_temp, teacher_temp = values
        return Arguments(Network(*tensors[:3]), Network(*tensors[3:6]), tensors[6], student_temp, teacher_temp)

    @property
    def multiplied(self) -> tuple[Tensor, ...]:
        """The tensors whose dtypes decide what can run: student's rows, prototypes of both."""
        return *self.student, self.teacher.v, self.teacher.g


class Statistics(NamedTuple):
    """Tensors that the forward saves for the backward."""

    student_lse: Tensor  # [N, 2]: maximum of a row's logits, and sum of exp(logit - maximum)
    teacher_lse: Tensor  # [N, 2]
    inverse_norms: Tensor  # [2, K]: 1 / ||v|| of student and teacher


class Weights(NamedTuple):
    """Effective prototypes g v / ||v|| of both networks, in the dtype of products."""

    student: Tensor  # [K, d]
    teacher: Tensor  # [K, d]
