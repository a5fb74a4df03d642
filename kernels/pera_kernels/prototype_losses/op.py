"""Op ``pera::prototype_losses``: schema, fake, autograd. It uses the kernels of distillation_loss and koleo."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pera_kernels import backend, cost, products
from pera_kernels.distillation_loss import op as distillation
from pera_kernels.distillation_loss.arguments import Arguments, Network, Statistics, Weights
from pera_kernels.distillation_loss.weight_norm import NATIVE_NAMES, accumulation_dtype
from pera_kernels.koleo import gram
from pera_kernels.koleo import op as koleo

from . import reference

backend.register("prototype_losses", "triton", available=backend.needs_triton)
backend.register("prototype_losses", "native", available=backend.needs_native(*NATIVE_NAMES))
backend.register("prototype_losses", "chunked")

# What the forward keeps for the backward.
NUM_STATISTICS = len(Statistics._fields) + len(gram.Pairs._fields) + len(Weights._fields)


@torch.library.custom_op("pera::prototype_losses", mutates_args=())
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
    spread_rows: int,
    num_crops: int,
) -> list[Tensor]:
    arguments = Arguments.of(
        student_rows, student_v, student_g, teacher_rows, teacher_v, teacher_g, center, student_temp, teacher_temp
    )
    forward, _ = distillation.implementation(arguments)
    weights = None
    if with_weights := distillation.forward_with_weights(arguments):
        entropies, statistics, weights = with_weights(arguments)
    else:
        entropies, statistics = forward(arguments)
    native = koleo.runs_in_native(*arguments.student)
    norms, made = statistics.inverse_norms[0], None if weights is None else weights.student
    spread = gram.forward(student_rows[:spread_rows], student_v, student_g, num_crops, native, norms, made)
    # The backward pass comes next in a step: what it would make again is kept until then, at no cost at the peak.
    kept = weights or (student_rows.new_empty(0), student_rows.new_empty(0))
    return [entropies, spread.loss, *statistics, *spread.pairs, *kept]


@_forward.register_fake
def _(*inputs):
    arguments, spread_rows = Arguments.of(*inputs[:-2]), inputs[-2]
    student_rows, student_v, _ = arguments.student
    dtype = accumulation_dtype(student_rows.dtype)
    n, d = student_rows.shape

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return student_rows.new_empty(shape, dtype=dtype)

    distances = new(spread_rows, dtype=torch.float64)
    statistics = [new(n, 2), new(n, 2), new(2, student_v.shape[0])]
    spread = [distances, new(spread_rows, dtype=torch.int64), torch.empty_like(distances)]
    made = distillation.forward_with_weights(arguments) is not None
    half = products.product_dtype(student_rows.dtype, student_rows.device)
    shape = student_v.shape if made else (0,)
    weights = [new(*shape, dtype=half if made else student_rows.dtype) for _ in range(2)]
    return [new(n), new(), *statistics, *spread, new(spread_rows, d), new(spread_rows, d), *weights]


def _differentiate(arguments: Arguments, count: int, num_crops: int) -> Callable[..., tuple[Tensor, Any]]:
    """KoLeo's backward up to the prototypes: kernels where the walk over them is made by kernels, else PyTorch's.

    Its second result is what the distillation's backward that runs there takes as ``other``.
    """
    if distillation.forward_with_weights(arguments):
        from pera_kernels.koleo import triton

        if triton.why_not(arguments.student.rows[:count], num_crops) is None:
            return triton.differentiate
    return gram.differentiate


@torch.library.custom_op("pera::prototype_losses_backward", mutates_args=())
def _backward(
    grad_entropies: Tensor,
    grad_spread: Tensor,
    tensors: list[Tensor],
    statistics: list[Tensor],
    student_temp: float,
    teacher_temp: float,
    spread_rows: int,
    num_crops: int,
    need_prototypes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = Network(*tensors[:3]), Network(*tensors[3:6])
    arguments = Arguments(student, teacher, tensors[6], student_temp, teacher_temp)
    first, last = len(Statistics._fields), -len(Weights._fields)
    kept, pairs = Statistics(*statistics[:first]), gram.Pairs(*statistics[first:last])
    weights = Weights(*statistics[last:])
    _, backward = distillation.implementation(arguments)
    grad_spread_rows, other = None, None
    if spread_rows:
        differentiate = _differentiate(arguments, spread_rows, num_crops)
        grad_spread_rows, other = differentiate(grad_spread, student.rows[:spread_rows], pairs, num_crops)
    if weights.student.numel():  # the forward made them, so this is the backward that takes them
        backward = partial(backward, weights=weights)
    grad_rows, grad_v, grad_g = backward(grad_entropies, arguments, kept, True, need_prototypes, other=other)
    if grad_spread_rows is not None:
        grad_rows[:spread_rows] += grad_spread_rows.to(grad_rows.dtype)
    return grad_rows, grad_v, grad_g


@_backward.register_fake
def _(_grad_entropies, _grad_spread, tensors, *rest):
    (rows, v, g), need_prototypes = tensors[:3], rest[-1]
    prototypes = (torch.empty_like(v), torch.empty_like(g)) if need_prototypes else (v.new_empty(0), g.new_empty(0))
    return torch.empty_like(rows), *prototypes


cost.opened("pera::prototype_losses", "pera::prototype_losses_backward")


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.student_temp, ctx.teacher_temp, ctx.spread_rows, ctx.num_crops = inputs
    ctx.set_materialize_grads(False)  # no zeros for the results without a gradient
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*tensors, *output[2:])


def _autograd(ctx, grads: list[Tensor | None]):
    saved, needs = list(ctx.saved_tensors), ctx.needs_input_grad[:3]
    entropies, spread = grads[:2]
    rows = saved[0]
    wide = accumulation_dtype(rows.dtype)
    entropies = rows.new_zeros(rows.shape[0], dtype=wide) if entropies is None else entropies
    spread = rows.new_zeros((), dtype=wide) if spread is None else spread
    constants = ctx.student_temp, ctx.teacher_temp, ctx.spread_rows, ctx.num_crops
    result = _backward(
        *(entropies, spread, saved[:-NUM_STATISTICS], saved[-NUM_STATISTICS:]), *constants, needs[1] or needs[2]
    )
    return *(g if need else None for g, need in zip(result, needs, strict=True)), *(None,) * 8


_forward.register_autograd(_autograd, setup_context=_setup_context)


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
    """``distillation_loss`` of all rows and ``koleo`` of the first ``spread_rows``, in one op.

    Both differentiate the same K x d prototypes. Together, their gradients are written once, in one walk, and not
    twice and then summed; and 1 / ||v|| is computed once for the step.

    Args:
        student_rows: [N, d], as all tensors here: see ``pera_kernels.distillation_loss``.
        student_v, student_g, teacher_rows, teacher_v, teacher_g, center, student_temp, teacher_temp: as there.
        spread_rows: the leading rows of the student (its global crops) that KoLeo spreads.
        num_crops: global crops that those come from, see ``pera_kernels.koleo``.

    Returns:
        (cross entropy [N], KoLeo []), both float32 (float64 for float64 rows); gradients for student_rows, student_v
        and student_g, in their dtypes. A repeat gives equal bits.

    Raises:
        TypeError, ValueError: an argument of another type or shape; the message names it.
    """
    arguments = (student_rows, student_v, student_g, teacher_rows, teacher_v, teacher_g, center)
    distillation.check(Arguments.of(*arguments, student_temp, teacher_temp))
    if not 0 <= spread_rows <= student_rows.shape[0]:
        raise ValueError(f"spread_rows must be 0 to {student_rows.shape[0]} (the rows), got {spread_rows}")
    koleo.check_rows(student_rows[:spread_rows], num_crops)
    constants = student_temp, teacher_temp, spread_rows, num_crops
    if not torch.compiler.is_compiling() and backend.choose("prototype_losses", student_rows.device) == "reference":
        return reference.prototype_losses(*arguments, *constants)
    entropies, spread, *_ = _forward(*arguments, *constants)
    return entropies, spread
