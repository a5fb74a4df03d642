"""Named tuples of the arguments of `distillation_loss` and of what its forward saves, for code below the op."""

from __future__ import annotations

from typing import NamedTuple

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
    def of(
        student_rows: Tensor,
        student_v: Tensor,
        student_g: Tensor,
        teacher_rows: Tensor,
        teacher_v: Tensor,
        teacher_g: Tensor,
        center: Tensor,
        student_temp: float,
        teacher_temp: float,
    ) -> Arguments:
        """Build from the op's arguments, in their order."""
        student, teacher = Network(student_rows, student_v, student_g), Network(teacher_rows, teacher_v, teacher_g)
        return Arguments(student, teacher, center, student_temp, teacher_temp)

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
