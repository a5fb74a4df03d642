"""Op ``pera::prototype_losses``: schema, fake, autograd. It has no kernels of its own: README.md beside this."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pera_kernels import backend, cost, products
from pera_kernels.distillation_loss import op as distillation
from pera_kernels.distillation_loss.weight_norm import NATIVE_NAMES, accumulation_dtype
from pera_kernels.koleo import gram
from pera_kernels.koleo import op as koleo

from . import reference

backend.register("prototype_losses", "triton", available=backend.needs_triton)
backend.register("prototype_losses", "native", available=backend.needs_native(*NATIVE_NAMES))
backend.register("prototype_losses", "chunked")

NUM_STATISTICS = 10  # what the forward keeps for the backward: student_lse .. teacher_weights below


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
    groups: int,
) -> list[Tensor]:
    student, teacher = (student_rows, student_v, student_g), (teacher_rows, teacher_v, teacher_g)
    forward, _ = distillation.implementation(*student, teacher_v, teacher_g)
    arguments = *student, *teacher, center, student_temp, teacher_temp
    if with_weights := distillation.forward_with_weights(*student, teacher_v, teacher_g):
        statistics, weights = with_weights(*arguments)
    else:
        statistics, weights = forward(*arguments), None
    entropies, student_lse, teacher_lse, inverse_norms = statistics
    native = koleo.runs_in_native(*student)
    made = None if weights is None else weights[0]
    spread = gram.forward(student_rows[:spread_rows], student_v, student_g, groups, native, inverse_norms[0], made)
    # The backward pass comes next in a step: what it would make again is kept until then, at no cost at the peak.
    kept = weights or (student_rows.new_empty(0), student_rows.new_empty(0))
    return [entropies, spread.loss, student_lse, teacher_lse, inverse_norms, *spread[1:-1], *kept]


@_forward.register_fake
def _(
    student_rows,
    student_v,
    student_g,
    teacher_rows,
    teacher_v,
    teacher_g,
    center,
    student_temp,
    teacher_temp,
    spread_rows,
    groups,
):
    dtype = accumulation_dtype(student_rows.dtype)
    n, d = student_rows.shape

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return student_rows.new_empty(shape, dtype=dtype)

    distances = new(spread_rows, dtype=torch.float64)
    statistics = [new(n, 2), new(n, 2), new(2, student_v.shape[0])]
    spread = [distances, new(spread_rows, dtype=torch.int64), torch.empty_like(distances)]
    made = distillation.forward_with_weights(student_rows, student_v, student_g, teacher_v, teacher_g) is not None
    half = products.product_dtype(student_rows.dtype, student_rows.device)
    shape = student_v.shape if made else (0,)
    weights = [new(*shape, dtype=half if made else student_rows.dtype) for _ in range(2)]
    return [new(n), new(), *statistics, *spread, new(spread_rows, d), new(spread_rows, d), *weights]


def _differentiate(
    rows: Tensor, prototypes: tuple[Tensor, ...], count: int, groups: int
) -> Callable[..., tuple[Tensor, Any]]:
    """KoLeo's backward up to the prototypes: kernels where the walk over them is made by kernels, else PyTorch's.

    Its second result is what the distillation's backward that runs there takes as ``other``.
    """
    if distillation.forward_with_weights(rows, *prototypes):
        from pera_kernels.koleo import triton

        if triton.why_not(rows[:count], groups) is None:
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
    groups: int,
    need_prototypes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    student_rows, student_v, student_g, teacher_rows, teacher_v, teacher_g, center = tensors
    student_lse, teacher_lse, inverse_norms, norms, neighbours, distances, *grams, student_w, teacher_w = statistics
    _, backward = distillation.implementation(student_rows, student_v, student_g, teacher_v, teacher_g)
    grad_spread_rows, other = None, None
    if spread_rows:
        prototypes = student_v, student_g, teacher_v, teacher_g
        grad_spread_rows, other = _differentiate(student_rows, prototypes, spread_rows, groups)(
            *(grad_spread, student_rows[:spread_rows]),
            *(norms, neighbours, distances, *grams, groups),
        )
    if student_w.numel():  # the forward made them, so this is the backward that takes them
        backward = partial(backward, weights=(student_w, teacher_w))
    grad_rows, grad_v, grad_g = backward(
        *(grad_entropies, student_rows, student_v, student_g, teacher_rows, teacher_v, teacher_g, center),
        *(student_lse, teacher_lse, inverse_norms, student_temp, teacher_temp, True, need_prototypes),
        other=other,
    )
    if grad_spread_rows is not None:
        grad_rows[:spread_rows] += grad_spread_rows.to(grad_rows.dtype)
    return grad_rows, grad_v, grad_g


@_backward.register_fake
def _(
    grad_entropies,
    grad_spread,
    tensors,
    statistics,
    student_temp,
    teacher_temp,
    spread_rows,
    groups,
    need_prototypes,
):
    rows, v, g = tensors[:3]
    prototypes = (torch.empty_like(v), torch.empty_like(g)) if need_prototypes else (v.new_empty(0), g.new_empty(0))
    return torch.empty_like(rows), *prototypes


cost.opened("pera::prototype_losses", "pera::prototype_losses_backward")


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.student_temp, ctx.teacher_temp, ctx.spread_rows, ctx.groups = inputs
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
    constants = ctx.student_temp, ctx.teacher_temp, ctx.spread_rows, ctx.groups
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
    groups: int,
) -> tuple[Tensor, Tensor]:
    """``distillation_loss`` of all rows and ``koleo`` of the first ``spread_rows``, in one op.

    Both differentiate the same K x d prototypes. Together, their gradients are written once, in one walk, and not
    twice and then summed; and 1 / ||v|| is computed once for the step.

    Args:
        student_rows: [N, d], as all tensors here: see ``pera_kernels.distillation_loss``.
        student_v, student_g, teacher_rows, teacher_v, teacher_g, center, student_temp, teacher_temp: as there.
        spread_rows: the leading rows of the student (its global crops) that KoLeo spreads.
        groups: equal groups that those are in, see ``pera_kernels.koleo``.

    Returns:
        (cross entropy [N], KoLeo []), both float32 (float64 for float64 rows); gradients for student_rows, student_v
        and student_g, in their dtypes. A repeat gives equal bits.

    Raises:
        TypeError, ValueError: an argument of another type or shape; the message names it.
    """
    arguments = (student_rows, student_v, student_g, teacher_rows, teacher_v, teacher_g, center)
    distillation.check(*arguments, student_temp, teacher_temp)
    if not 0 <= spread_rows <= student_rows.shape[0]:
        raise ValueError(f"spread_rows must be 0 to {student_rows.shape[0]} (the rows), got {spread_rows}")
    koleo.check_rows(student_rows[:spread_rows], groups)
    constants = student_temp, teacher_temp, spread_rows, groups
    if not torch.compiler.is_compiling() and backend.choose("prototype_losses", student_rows.device) == "reference":
        return reference.prototype_losses(*arguments, *constants)
    entropies, spread, *_ = _forward(*arguments, *constants)
    return entropies, spread
