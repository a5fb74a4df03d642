"""The definition of the distillation loss in plain PyTorch, with all logits in memory.

Source: docs/method.md sections 4.6 and 5.1.
"""

import torch
from torch import Tensor


def effective_prototypes(v: Tensor, g: Tensor) -> Tensor:
    """Weight norm: row k is ``g_k * v_k / ||v_k||``.

    Args:
        v: [K, d].
        g: [K, 1].

    Returns:
        [K, d] in float32, or float64 if v is.
    """
    v = v.to(torch.promote_types(v.dtype, torch.float32))
    return g.to(v.dtype) * v / v.norm(dim=1, keepdim=True)


def distillation_loss(
    student_rows: Tensor,  # [N, d]
    student_v: Tensor,  # [K, d]
    student_g: Tensor,  # [K, 1]
    teacher_rows: Tensor,  # [N, d]
    teacher_v: Tensor,  # [K, d]
    teacher_g: Tensor,  # [K, 1]
    center: Tensor,  # [K]
    student_temp: float,
    teacher_temp: float,
) -> Tensor:
    """Per row, the cross entropy of the centred, sharpened teacher distribution against the student's.

    Matrix products run in the dtype of the rows, softmax in float32 (float64 for float64 rows). The teacher and the
    center are constants.

    Returns:
        [N] float32 (float64 for float64 rows).
    """
    dtype = torch.promote_types(student_rows.dtype, torch.float32)
    student = student_rows @ effective_prototypes(student_v, student_g).to(student_rows.dtype).t()
    with torch.no_grad():
        teacher = teacher_rows @ effective_prototypes(teacher_v, teacher_g).to(teacher_rows.dtype).t()
        target = ((teacher.to(dtype) - center.to(dtype)) / teacher_temp).softmax(1)
    return -(target * (student.to(dtype) / student_temp).log_softmax(1)).sum(1)
