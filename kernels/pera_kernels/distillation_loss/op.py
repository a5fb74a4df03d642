"""Op ``pera::distillation_loss``: schema, fake, autograd, dispatch. The maths and the costs: README.md beside this."""

from functools import partial

import torch
from torch import Tensor

from pera_kernels import backend, cost

from . import chunked, reference
from .arguments import Arguments, Statistics
from .weight_norm import NATIVE_NAMES, accumulation_dtype, check_prototypes, runs_native

backend.register("distillation_loss", "triton", available=backend.needs_triton)
backend.register("distillation_loss", "native", available=backend.needs_native(*NATIVE_NAMES))
backend.register("distillation_loss", "chunked")


def implementation(arguments: Arguments):
    """forward and backward of the implementation that runs; where it does not take these dtypes, of the next one."""
    match backend.choose("distillation_loss", arguments.student.rows.device):
        case "triton":
            from . import triton

            if triton.why_not(*arguments.multiplied) is None:
                return triton.forward, triton.backward
        case "native":
            if runs_native(*arguments.multiplied):
                return partial(chunked.forward, native=True), partial(chunked.backward, native=True)
    return chunked.forward, chunked.backward


def forward_with_weights(arguments: Arguments):
    """The forward that also returns both networks' effective prototypes, where it makes them all; None elsewhere."""
    if backend.choose("distillation_loss", arguments.student.rows.device) == "triton":
        from . import triton

        if triton.why_not(*arguments.multiplied) is None:
            return triton.forward_with_weights
    return None


@torch.library.custom_op("pera::distillation_loss", mutates_args=())
def _forward(
    student_rows: Tensor,
    student_v: Tensor,
    student_g: Tensor,
    teacher_rows: Tensor,
    teacher_v: Tensor,
    teacher_g: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = Arguments.of(
        student_rows, student_v, student_g, teacher_rows, teacher_v, teacher_g, center, student_temp, teacher_temp
    )
    forward, _ = implementation(arguments)
    loss, (student_lse, teacher_lse, inverse_norms) = forward(arguments)
    return loss, student_lse, teacher_lse, inverse_norms


@_forward.register_fake
def _(student_rows, student_v, *_rest):
    loss = student_rows.new_empty(student_rows.shape[0], dtype=accumulation_dtype(student_rows.dtype))
    lse = loss.new_empty(loss.shape[0], 2)
    return loss, lse, torch.empty_like(lse), loss.new_empty(2, student_v.shape[0])


@torch.library.custom_op("pera::distillation_loss_backward", mutates_args=())
def _backward(
    grad: Tensor,
    student_rows: Tensor,
    student_v: Tensor,
    student_g: Tensor,
    teacher_rows: Tensor,
    teacher_v: Tensor,
    teacher_g: Tensor,
    center: Tensor,
    student_lse: Tensor,
    teacher_lse: Tensor,
    inverse_norms: Tensor,
    student_temp: float,
    teacher_temp: float,
    need_rows: bool,
    need_prototypes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = Arguments.of(
        student_rows, student_v, student_g, teacher_rows, teacher_v, teacher_g, center, student_temp, teacher_temp
    )
    _, backward = implementation(arguments)
    statistics = Statistics(student_lse, teacher_lse, inverse_norms)
    return backward(grad, arguments, statistics, need_rows, need_prototypes)


@_backward.register_fake
def _(_grad, student_rows, student_v, student_g, *rest):
    need_rows, need_prototypes = rest[-2:]
    return (
        student_rows.new_empty(student_rows.shape if need_rows else 0),
        student_v.new_empty(student_v.shape if need_prototypes else 0),
        student_g.new_empty(student_g.shape if need_prototypes else 0),
    )


cost.opened("pera::distillation_loss", "pera::distillation_loss_backward")


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.student_temp, ctx.teacher_temp = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _autograd(ctx, grad: Tensor, *_: Tensor | None):
    needs = ctx.needs_input_grad[:3]  # a frozen last layer costs no product and no gradient of its size
    grads = _backward(grad, *ctx.saved_tensors, ctx.student_temp, ctx.teacher_temp, needs[0], needs[1] or needs[2])
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 6


_forward.register_autograd(_autograd, setup_context=_setup_context)


def distillation_loss(
    student_rows: Tensor,
    student_v: Tensor,
    student_g: Tensor,
    teacher_rows: Tensor,
    teacher_v: Tensor,
    teacher_g: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> Tensor:
    """Cross entropy of each row's teacher distribution over prototypes against the student's.

    docs/method.md section 5.1.

        w_k = g_k v_k / ||v_k||,  s = rows_s . w_k / T_s,  t = (rows_t . w'_k - center_k) / T_t
        loss_n = -sum_k softmax(t_n)_k log_softmax(s_n)_k = lse(s_n) - E_{softmax(t_n)}[s_n]

    The [N, K] logits are never in memory, nor is W: one pass over chunks of prototypes; the backward makes another
    and writes each chunk's weight gradient once. Saved for it: the arguments, two log-sum-exps per row (each as
    its maximum and its sum) and 1 / ||v|| of both networks. A gradient that is not needed costs nothing.

    Args:
        student_rows: [N, d] bottleneck rows; float64, float32, bfloat16 or float16: the dtype of the matrix products
            (float32 for half types on a CPU that has no instructions for them).
        student_v: [K, d] weight-norm directions, any float dtype.
        student_g: [K, 1] weight-norm magnitudes.
        teacher_rows: [N, d], row n is student row n's target.
        teacher_v: [K, d].
        teacher_g: [K, 1].
        center: [K], taken off the teacher's logits.
        student_temp: T_s > 0.
        teacher_temp: T_t > 0.

    Returns:
        [N] float32 (float64 for float64 student rows), softmax arithmetic in the same. Gradients for student_rows,
        student_v, student_g, in their dtypes; the teacher and the center are constants. A repeat gives equal bits.

    Raises:
        TypeError, ValueError: an argument of another type or shape; the message names it.
    """
    arguments = (student_rows, student_v, student_g, teacher_rows, teacher_v, teacher_g, center)
    check(Arguments.of(*arguments, student_temp, teacher_temp))
    if not torch.compiler.is_compiling() and backend.choose("distillation_loss", student_rows.device) == "reference":
        return reference.distillation_loss(*arguments, student_temp, teacher_temp)
    return _forward(*arguments, student_temp, teacher_temp)[0]


def check(arguments: Arguments) -> None:
    """Raises TypeError or ValueError, naming the argument, unless they are what ``distillation_loss`` takes."""
    student, teacher, center, student_temp, teacher_temp = arguments
    check_prototypes(student.v, student.g, "student_")
    check_prototypes(teacher.v, teacher.g, "teacher_")
    for name, (rows, v, _) in (("student", student), ("teacher", teacher)):
        if not rows.is_floating_point():
            raise TypeError(f"{name}_rows must be floating point, got {rows.dtype}")
        if rows.ndim != 2 or rows.shape[1] != v.shape[1]:
            raise ValueError(f"{name}_rows must be [N, {v.shape[1]}], got {list(rows.shape)}")
    if teacher.rows.shape[0] != student.rows.shape[0]:
        raise ValueError(f"{teacher.rows.shape[0]} teacher_rows for {student.rows.shape[0]} student_rows")
    if teacher.v.shape[0] != student.v.shape[0]:
        raise ValueError(f"teacher_v has {teacher.v.shape[0]} prototypes, student_v has {student.v.shape[0]}")
    if tuple(center.shape) != (student.v.shape[0],):
        raise ValueError(f"center must be [{student.v.shape[0]}], got {list(center.shape)}")
    for name, value in (("student_temp", student_temp), ("teacher_temp", teacher_temp)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
