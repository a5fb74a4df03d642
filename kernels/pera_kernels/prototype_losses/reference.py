"""Definition of prototype_losses: the two losses, one after the other."""

from torch import Tensor

from pera_kernels.distillation_loss.reference import distillation_loss
from pera_kernels.koleo.reference import koleo


def prototype_losses(
    student_rows: Tensor,
    student_v: Tensor,
    student_g: Tensor,
    teacher_rows: Tensor,
    teacher_v: Tensor,
    teacher_g: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    spread_rows: int,
    num_crops: int,
) -> tuple[Tensor, Tensor]:
    """See ``pera_kernels.prototype_losses``; all logits in memory."""
    student, teacher = (student_rows, student_v, student_g), (teacher_rows, teacher_v, teacher_g)
    entropies = distillation_loss(*student, *teacher, center, student_temp, teacher_temp)
    return entropies, koleo(student_rows[:spread_rows], student_v, student_g, num_crops)
