"""pera::embed_tokens: schema, shapes, gradient."""

import torch
from torch import Tensor

from .. import backend, cost
from ..packing import HALF_OR_SINGLE
from ..products import matmul
from .reference import embed_tokens as _reference

backend.register("embed_tokens", "triton", available=backend.needs_triton)
backend.register("embed_tokens", "native", available=backend.needs_native("embed_tokens_pack", "embed_tokens_sums"))


def _kernels(rows: Tensor):
    """What has the kernels around the matrix product that take the rows, or None: then PyTorch does it."""
    name = backend.choose("embed_tokens", rows.device)
    if name == "triton":
        from . import triton

        return triton if triton.why_not(rows) is None else None
    return torch.ops.pera_native if name == "native" and rows.dtype in HALF_OR_SINGLE else None


@torch.library.custom_op("pera::embed_tokens", mutates_args=())
def _embed_tokens(rows: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, cls: Tensor, index: Tensor) -> Tensor:
    if (kernels := _kernels(rows)) is not None:
        return kernels.embed_tokens_pack(matmul(rows, weight.t()), bias, pos, cls, index)
    return _reference(rows, weight, bias, pos, cls, index)


@_embed_tokens.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, cls: Tensor, index: Tensor) -> Tensor:
    return rows.new_empty(index.shape[0] * (1 + index.shape[1]), weight.shape[0])


@torch.library.custom_op("pera::embed_tokens_backward", mutates_args=())
def _backward(grad: Tensor, rows: Tensor, weight: Tensor, pos: Tensor, index: Tensor) -> list[Tensor]:
    if (kernels := _kernels(rows)) is not None:
        grad_patches, grad_bias, grad_pos = kernels.embed_tokens_sums(grad.to(rows.dtype), pos, index)
        return [matmul(grad_patches.t(), rows).to(weight.dtype), grad_bias, grad_pos, grad_pos[0].clone()]
    n_seq, n_visible = index.shape
    grad = grad.view(n_seq, 1 + n_visible, weight.shape[0])
    grad_first = grad[:, 0].sum(0, dtype=weight.dtype)
    grad_patches = grad[:, 1:].reshape(n_seq * n_visible, weight.shape[0])
    grad_weight = matmul(grad_patches.t(), rows).to(weight.dtype)
    grad_bias = grad_patches.sum(0, dtype=weight.dtype)
    # Position sums run in the master dtype: a position is hit by up to every sequence of the batch.
    grad_pos = torch.zeros_like(pos)
    grad_pos.index_add_(0, 1 + index.flatten(), grad_patches.to(pos.dtype))
    grad_pos[0] += grad_first
    grad_cls = grad_first.clone()
    return [grad_weight, grad_bias, grad_pos, grad_cls]


@_backward.register_fake
def _(grad: Tensor, rows: Tensor, weight: Tensor, pos: Tensor, index: Tensor) -> list[Tensor]:
    dim = weight.shape[0]
    return [torch.empty_like(weight), weight.new_empty(dim), torch.empty_like(pos), weight.new_empty(dim)]


cost.opened("pera::embed_tokens", "pera::embed_tokens_backward")


def _setup_context(ctx, inputs, output) -> None:
    rows, weight, _, pos, _, index = inputs
    ctx.save_for_backward(rows, weight, pos, index)


def _autograd(ctx, grad: Tensor):
    rows, weight, pos, index = ctx.saved_tensors
    grad_weight, grad_bias, grad_pos, grad_cls = _backward(grad.contiguous(), rows, weight, pos, index)
    return None, grad_weight, grad_bias, grad_pos, grad_cls, None


_embed_tokens.register_autograd(_autograd, setup_context=_setup_context)


def embed_tokens(rows: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, cls: Tensor, index: Tensor) -> Tensor:
    """Embed visible patches: ``rows @ weight.T + bias + pos[1 + index]``, and ``cls + pos[0]`` ahead of each sequence.

    METHOD: only the patches that are seen are ever projected.

    Args:
        rows: patch rows [N * n, C * P * P] in the compute dtype, sequence by sequence. Data: takes no gradient.
        weight: projection [D, C * P * P], any float dtype; cast to the dtype of rows for the product.
        bias: [D], dtype of weight.
        pos: position embedding [1 + L, D] of the crop's grid, row 0 for cls; dtype of weight.
        cls: cls token [D], dtype of weight.
        index: int32 [N, n], the patch number in raster order of each row, each once in a sequence.

    Returns:
        Tokens [N * (1 + n), D] in the dtype of rows; cls first in each sequence.

    Raises:
        ValueError: shapes that do not fit together.
    """
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
    return _embed_tokens(rows, weight, bias, pos, cls, index)
