"""pera::embed_tokens: schema, shapes, gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend, cost
from ..products import matmul, weight_gradient
from .reference import embed_tokens as _reference

backend.register("embed_tokens", "triton", available=backend.needs_triton)
backend.register("embed_tokens", "native", available=backend.needs_native("embed_tokens_pack", "embed_tokens_sums"))


@torch.library.custom_op("pera::embed_tokens", mutates_args=())
def _embed_tokens(
    rows: list[Tensor], weight: Tensor, bias: Tensor, pos: list[Tensor], cls: Tensor, index: list[Tensor]
) -> Tensor:
    if not rows or (kernels := backend.kernels("embed_tokens", rows[0])) is None:
        return _reference(rows, weight, bias, pos, cls, index)
    parts = [(matmul(x, weight.t()), p, i) for x, p, i in zip(rows, pos, index, strict=True)]
    if kernels is torch.ops.pera_native:
        return _joined([kernels.embed_tokens_pack(x, bias, p, cls, i) for x, p, i in parts])
    out = rows[0].new_empty(sum(_tokens(index)), weight.shape[0])
    for (x, p, i), target in zip(parts, out.split(_tokens(index)), strict=True):
        kernels.embed_tokens_pack(x, bias, p, cls, i, target)
    return out


def _tokens(index: Sequence[Tensor]) -> list[int]:
    """Tokens of each group."""
    return [i.shape[0] * (1 + i.shape[1]) for i in index]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _sum(tensors: list[Tensor]) -> Tensor:
    return sum(tensors[1:], tensors[0])


@_embed_tokens.register_fake
def _(rows, weight, bias, pos, cls, index) -> Tensor:
    return rows[0].new_empty(sum(_tokens(index)), weight.shape[0])


@torch.library.custom_op("pera::embed_tokens_backward", mutates_args=())
def _backward(grad: Tensor, rows: list[Tensor], weight: Tensor, pos: list[Tensor], index: list[Tensor]) -> list[Tensor]:
    grads = grad.to(rows[0].dtype).split(_tokens(index))
    groups = zip(
        *[_group_gradients(*group, weight) for group in zip(grads, rows, pos, index, strict=True)], strict=True
    )
    grad_weight, grad_bias, grad_pos = map(list, groups)
    # cls is added to the row of pos that it stands at.
    grad_cls = grad_pos[0][0].clone() if len(grad_pos) == 1 else _sum([p[0] for p in grad_pos])
    return [_sum(grad_weight), _sum(grad_bias), grad_cls, *grad_pos]


def _group_gradients(
    grad: Tensor, rows: Tensor, pos: Tensor, index: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, bias and pos from one group."""
    if (kernels := backend.kernels("embed_tokens", rows)) is not None:
        grad_patches, grad_bias, grad_pos = kernels.embed_tokens_sums(grad, pos, index)
        return weight_gradient(grad_patches, rows, weight.dtype), grad_bias, grad_pos
    n_seq, n_visible = index.shape
    grad = grad.view(n_seq, 1 + n_visible, weight.shape[0])
    grad_patches = grad[:, 1:].reshape(n_seq * n_visible, weight.shape[0])
    # Position sums run in the master dtype: a position is hit by up to every sequence of the batch.
    grad_pos = torch.zeros_like(pos)
    grad_pos.index_add_(0, 1 + index.flatten(), grad_patches.to(pos.dtype))
    grad_pos[0] += grad[:, 0].sum(0, dtype=weight.dtype)
    grad_weight = weight_gradient(grad_patches, rows, weight.dtype)
    return grad_weight, grad_patches.sum(0, dtype=weight.dtype), grad_pos


@_backward.register_fake
def _(grad, rows, weight, pos, index) -> list[Tensor]:
    dim = weight.shape[0]
    return [torch.empty_like(weight), weight.new_empty(dim), weight.new_empty(dim), *map(torch.empty_like, pos)]


cost.opened("pera::embed_tokens", "pera::embed_tokens_backward")


def _setup_context(ctx, inputs, output) -> None:
    rows, weight, _, pos, _, index = inputs
    ctx.groups = len(rows)
    ctx.save_for_backward(weight, *rows, *pos, *index)


def _autograd(ctx, grad: Tensor):
    weight, *rest = ctx.saved_tensors
    n = ctx.groups
    rows, pos, index = rest[:n], rest[n : 2 * n], rest[2 * n :]
    grad_weight, grad_bias, grad_cls, *grad_pos = _backward(grad.contiguous(), rows, weight, pos, index)
    return [None] * n, grad_weight, grad_bias, grad_pos, grad_cls, [None] * n


_embed_tokens.register_autograd(_autograd, setup_context=_setup_context)


def embed_tokens(
    rows: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    pos: Tensor | Sequence[Tensor],
    cls: Tensor,
    index: Tensor | Sequence[Tensor],
) -> Tensor:
    """Embed visible patches: ``rows @ weight.T + bias + pos[1 + index]``, and ``cls + pos[0]`` ahead of each sequence.

    Only the patches that are seen are ever projected (docs/method.md section 7.1).

    Args:
        rows: patch rows [N * n, C * P * P] in the compute dtype, sequence by sequence. Data: takes no gradient.
            Or a list of them, one for each group of sequences of one length.
        weight: projection [D, C * P * P], any float dtype; cast to the dtype of rows for the product.
        bias: [D], dtype of weight.
        pos: position embedding [1 + L, D] of the crop's grid, row 0 for cls; dtype of weight. A list if rows are.
        cls: cls token [D], dtype of weight.
        index: int32 [N, n], the patch number in raster order of each row, each once in a sequence. A list if rows are.

    Returns:
        Tokens [N * (1 + n), D] in the dtype of rows; cls first in each sequence; the groups one after another.

    Raises:
        ValueError: shapes that do not fit together.
    """
    rows, pos, index = ([x] if isinstance(x, Tensor) else list(x) for x in (rows, pos, index))
    if not len(rows) == len(pos) == len(index) > 0:
        raise ValueError(f"{len(rows)} groups of rows, {len(pos)} of pos, {len(index)} of index: must be equal, not 0")
    for group in zip(rows, pos, index, strict=True):
        _check(*group, weight, bias, cls)
    return _embed_tokens(rows, weight, bias, pos, cls, index)


def _check(rows: Tensor, pos: Tensor, index: Tensor, weight: Tensor, bias: Tensor, cls: Tensor) -> None:
    if index.ndim != 2 or rows.ndim != 2 or rows.shape[0] != index.numel():
        raise ValueError(f"rows {tuple(rows.shape)} must be [N * n, C * P * P] for index [N, n] {tuple(index.shape)}")
    if weight.ndim != 2 or weight.shape[1] != rows.shape[1]:
        raise ValueError(f"weight {tuple(weight.shape)} must be [D, {rows.shape[1]}]")
    dim = weight.shape[0]
    if bias.shape != (dim,) or cls.shape != (dim,) or pos.ndim != 2 or pos.shape[1] != dim:
        raise ValueError(
            f"bias {tuple(bias.shape)}, cls {tuple(cls.shape)} and pos {tuple(pos.shape)} must be"
            f" [D], [D] and [1 + L, D] with D = {dim}"
        )
