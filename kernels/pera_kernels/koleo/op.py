"""Op ``pera::koleo``: schema, fake, autograd, dispatch. The maths and the costs: README.md beside this."""

import torch
from torch import Tensor

from pera_kernels import backend, cost
from pera_kernels.distillation_loss.weight_norm import (
    NATIVE_NAMES,
    accumulation_dtype,
    check_prototypes,
    runs_native,
)

from . import gram, reference

# No "triton" here: its kernels are for the rest of a walk that prototype_losses makes. "On a GPU" in README.md.
backend.register("koleo", "native", available=backend.needs_native(*NATIVE_NAMES))
backend.register("koleo", "chunked")


def runs_in_native(rows: Tensor, v: Tensor, g: Tensor) -> bool:
    return backend.choose("koleo", rows.device) == "native" and runs_native(rows, v, g)


@torch.library.custom_op("pera::koleo", mutates_args=())
def _forward(
    rows: Tensor, v: Tensor, g: Tensor, num_crops: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, pairs, inverse_norms = gram.forward(rows, v, g, num_crops, runs_in_native(rows, v, g))
    norms, neighbours, distances, gram_rows, gram_differences = pairs
    return loss, norms, neighbours, distances, gram_rows, gram_differences, inverse_norms


@_forward.register_fake
def _(rows, v, g, num_crops):
    dtype = accumulation_dtype(rows.dtype)
    per_row = rows.new_empty(rows.shape[0], dtype=torch.float64)
    kept = rows.new_empty(rows.shape, dtype=dtype)
    return (
        rows.new_empty((), dtype=dtype),
        per_row,
        rows.new_empty(rows.shape[0], dtype=torch.int64),
        torch.empty_like(per_row),
        kept,
        torch.empty_like(kept),
        v.new_empty(v.shape[0], dtype=dtype),
    )


@torch.library.custom_op("pera::koleo_backward", mutates_args=())
def _backward(
    grad: Tensor,
    rows: Tensor,
    v: Tensor,
    g: Tensor,
    norms: Tensor,
    neighbours: Tensor,
    distances: Tensor,
    gram_rows: Tensor,
    gram_differences: Tensor,
    inverse_norms: Tensor,
    num_crops: int,
    need_prototypes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    pairs, native = gram.Pairs(norms, neighbours, distances, gram_rows, gram_differences), runs_in_native(rows, v, g)
    return gram.backward(grad, rows, v, g, pairs, inverse_norms, num_crops, need_prototypes, native)


@_backward.register_fake
def _(_grad, rows, v, g, *rest):
    need_prototypes = rest[-1]
    return (
        rows.new_empty(rows.shape),
        v.new_empty(v.shape if need_prototypes else 0),
        g.new_empty(g.shape if need_prototypes else 0),
    )


cost.opened("pera::koleo", "pera::koleo_backward")


def _setup_context(ctx, inputs, output) -> None:
    rows, v, g, ctx.num_crops = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(rows, v, g, *output[1:])


def _autograd(ctx, grad: Tensor, *_: Tensor | None):
    needs = ctx.needs_input_grad[:3]
    grads = _backward(grad, *ctx.saved_tensors, ctx.num_crops, needs[1] or needs[2])
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def koleo(rows: Tensor, v: Tensor, g: Tensor, num_crops: int) -> Tensor:
    """KoLeo of the prototype logits of each crop, summed over crops (docs/method.md section 5.3).

        y_i = W x_i / max(||W x_i||, 1e-8),   nn(i) = argmax_{j != i} y_i . y_j  within the crop of B rows
        loss = sum over crops of -1/B sum_i log(||y_i - y_nn(i) + 1e-8|| + 1e-8)

    The [R, K] logits are never in memory. Through G = W'W: y_i . y_j = x_i'G x_j / (n_i n_j), and the distance from
    D = x_i/n_i - x_nn/n_nn as D'GD + 2e-8 s'D + 1e-16 K, s = W'1 (not as 2 - 2 cos, which cancels for near rows).
    With few rows (4R < d) the same sums run over chunks of W D instead of G.

    Args:
        rows: [num_crops * B, d] bottleneck rows, crop after crop; float64, float32, bfloat16 or float16: the dtype of
            the matrix products (float32 for half types on a CPU that has no instructions for them).
        v: [K, d] weight-norm directions, any float dtype.
        g: [K, 1] weight-norm magnitudes.
        num_crops: global crops >= 1, of B rows each. B = 1: each row is its own neighbour; the gradient is zero.

    Returns:
        scalar float32 (float64 for float64 rows), accumulated in that precision; 0 for no rows. Gradients for rows, v
        and g in their dtypes; both a row and its neighbour take gradient, the choice of neighbour none. A repeat
        gives equal bits.

    Raises:
        TypeError, ValueError: an argument of another type or shape; the message names it.
    """
    check_prototypes(v, g, "")
    check_rows(rows, num_crops)
    if rows.shape[1] != v.shape[1]:
        raise ValueError(f"rows must be [num_crops * B, {v.shape[1]}], got {list(rows.shape)}")
    if not torch.compiler.is_compiling() and backend.choose("koleo", rows.device) == "reference":
        return reference.koleo(rows, v, g, num_crops)
    return _forward(rows, v, g, num_crops)[0]


def koleo_rows(rows: Tensor, num_crops: int) -> Tensor:
    """KoLeo on the bottleneck rows themselves (``koleo_on: bottleneck``): the cheap alternative, differentiable code.

    Args:
        rows: [num_crops * B, d], B >= 1, crop after crop; float dtype, arithmetic in float32 (float64 for float64).
        num_crops: number of global crops.

    Returns:
        scalar float32 (float64 for float64 rows): the sum over crops, as ``koleo`` gives it.

    Raises:
        TypeError, ValueError: an argument of another type or shape; the message names it.
    """
    check_rows(rows, num_crops)
    dtype = accumulation_dtype(rows.dtype)
    if rows.shape[0] == 0:
        return rows.sum(dtype=dtype)
    return torch.stack([reference.nearest_neighbour_entropy(p) for p in rows.to(dtype).chunk(num_crops)]).sum()


def check_rows(rows: Tensor, num_crops: int) -> None:
    """Raises TypeError or ValueError unless rows are floating [num_crops * B, d]."""
    if not rows.is_floating_point():
        raise TypeError(f"rows must be floating point, got {rows.dtype}")
    if rows.ndim != 2:
        raise ValueError(f"rows must be [num_crops * B, d], got {list(rows.shape)}")
    if num_crops < 1 or rows.shape[0] % num_crops:
        raise ValueError(f"num_crops must be at least 1 and divide the {rows.shape[0]} rows, got {num_crops}")
