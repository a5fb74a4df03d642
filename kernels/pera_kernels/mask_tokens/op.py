"""pera::mask_tokens: schema, shapes, gradient."""

import torch
from torch import Tensor

from .. import backend, cost
from .reference import mask_tokens as _reference

backend.register("mask_tokens", "triton", available=backend.needs_triton)
backend.register("mask_tokens", "native", available=backend.needs_native("mask_tokens", "mask_tokens_backward"))


@torch.library.custom_op("pera::mask_tokens", mutates_args=())
def _mask_tokens(tokens: Tensor, mask_token: Tensor, pos: Tensor, index: Tensor, rest: int) -> Tensor:
    kernels = backend.kernels("mask_tokens", tokens)
    if kernels is None:
        return _reference(tokens, mask_token, pos, index, rest)
    if kernels is not torch.ops.pera_native:
        return kernels.mask_tokens(tokens, mask_token, pos, index, rest)
    old, others = tokens.split([tokens.shape[0] - rest, rest])
    new = kernels.mask_tokens(old, mask_token, pos, index)
    return torch.cat([new, others]) if rest else new


@_mask_tokens.register_fake
def _(tokens: Tensor, mask_token: Tensor, pos: Tensor, index: Tensor, rest: int) -> Tensor:
    return tokens.new_empty(tokens.shape[0] + index.numel(), tokens.shape[1])


@torch.library.custom_op("pera::mask_tokens_backward", mutates_args=())
def _backward(grad: Tensor, pos: Tensor, index: Tensor, rest: int) -> list[Tensor]:
    kernels = backend.kernels("mask_tokens", grad)
    if kernels is not None and kernels is not torch.ops.pera_native:
        return list(kernels.mask_tokens_backward(grad, pos, index, rest))
    grad, others = grad.split([grad.shape[0] - rest, rest])
    gradients = _plain_backward(grad, pos, index) if kernels is None else kernels.mask_tokens_backward(grad, pos, index)
    grad_tokens, *parameters = gradients
    return [torch.cat([grad_tokens, others]) if rest else grad_tokens, *parameters]


def _plain_backward(grad: Tensor, pos: Tensor, index: Tensor) -> list[Tensor]:
    n_seq, n_new = index.shape
    dim = grad.shape[1]
    grad = grad.view(n_seq, grad.shape[0] // n_seq, dim)
    grad_old, grad_new = grad.split([grad.shape[1] - n_new, n_new], dim=1)
    grad_new = grad_new.reshape(n_seq * n_new, dim)
    grad_pos = torch.zeros_like(pos).index_add_(0, 1 + index.flatten(), grad_new.to(pos.dtype))
    # A copy even where reshape would make a view: an operator must not return its input.
    grad_old = grad_old.clone(memory_format=torch.contiguous_format).view(-1, dim)
    return [grad_old, grad_new.sum(0, dtype=pos.dtype), grad_pos]


@_backward.register_fake
def _(grad: Tensor, pos: Tensor, index: Tensor, rest: int) -> list[Tensor]:
    dim = grad.shape[1]
    return [grad.new_empty(grad.shape[0] - index.numel(), dim), pos.new_empty(dim), torch.empty_like(pos)]


cost.opened("pera::mask_tokens", "pera::mask_tokens_backward")


def _setup_context(ctx, inputs, output) -> None:
    _, _, pos, index, ctx.rest = inputs
    ctx.save_for_backward(pos, index)


def _autograd(ctx, grad: Tensor):
    pos, index = ctx.saved_tensors
    grad_tokens, grad_mask_token, grad_pos = _backward(grad.contiguous(), pos, index, ctx.rest)
    return grad_tokens, grad_mask_token, grad_pos, None, None


_mask_tokens.register_autograd(_autograd, setup_context=_setup_context)


def mask_tokens(tokens: Tensor, mask_token: Tensor, pos: Tensor, index: Tensor, rest: int = 0) -> Tensor:
    """Grow each packed sequence by one mask token per predicted patch: ``mask_token + pos[1 + index]``.

    docs/method.md section 4.5. Attention does not care about token order, so the new tokens stand behind the old ones.

    Args:
        tokens: N packed sequences of equal length [N * len + rest, D].
        mask_token: learned token [D], float32 or the dtype of pos.
        pos: position embedding [1 + L, D] of the crop's grid, row 0 for cls.
        index: int32 [N, n], predicted patches in raster order, each once in a sequence.
        rest: last rows of tokens, of other sequences, which come back as they are.

    Returns:
        Packed sequences [N * (len + n) + rest, D] in the dtype of tokens.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if index.ndim != 2 or tokens.ndim != 2 or not _fits(tokens.shape[0] - rest, index.shape[0]):
        others = f" and {rest} rows" if rest else ""
        raise ValueError(
            f"tokens {tuple(tokens.shape)} are not {tuple(index.shape)[:1]} sequences of equal length{others}"
        )
    if mask_token.shape != tokens.shape[1:] or pos.ndim != 2 or pos.shape[1] != tokens.shape[1]:
        raise ValueError(
            f"mask_token {tuple(mask_token.shape)} and pos {tuple(pos.shape)} must be [D] and [1 + L, D] with"
            f" D = {tokens.shape[1]}"
        )
    if tokens.shape[0] == rest:
        return tokens.clone()
    return _mask_tokens(tokens, mask_token, pos, index, rest)


def _fits(rows: int, sequences: int) -> bool:
    return rows >= 0 and (rows % sequences == 0 if sequences else rows == 0)
