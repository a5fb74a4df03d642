"""pera::attention: schema, shapes, gradient, and the choice of an implementation for each group.

Short sequences and long ones want different kernels. Where Triton runs, groups of short sequences go there and the
others to the first of xformers, varlen and sdpa that can take them; otherwise one implementation takes all groups.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend, cost
from ..column_sums import column_sums
from ..packing import check, num_tokens, pairs
from . import cudnn, native, sdpa, varlen, xformers
from .arguments import Attended, Packed

# Groups of at most this many tokens a sequence go to the Triton kernels, which take up to 32; 0: none. Set it by what
# `pera-fast bench attention --all` measures. PERA_SHORT_ATTENTION=1 or 0 overrides: all up to 32, or none.
SHORT_SEQUENCE = 32
TRITON_LENGTH = 32

# Fastest first; reference takes everything. cudnn runs where it was measured to be the fastest (``measured``), or is
# asked for.
_WHOLE = {
    "amx": native.amx,
    "avx512_bf16": native.avx512_bf16,
    "cudnn": cudnn,
    "xformers": xformers,
    "varlen": varlen,
    "sdpa": sdpa.fused,
    "reference": sdpa.formula,
}
_ON_CPU, _ON_GPU = ("amx", "avx512_bf16"), ("cudnn", "xformers", "varlen")


def _short_sequence() -> int:
    """Longest sequence that goes to the Triton kernels."""
    wanted = os.environ.get("PERA_SHORT_ATTENTION", "").strip()
    choices = {"": min(SHORT_SEQUENCE, TRITON_LENGTH), "0": 0, "1": TRITON_LENGTH}
    if wanted not in choices:
        raise ValueError(f"PERA_SHORT_ATTENTION={wanted}: must be 0 or 1")
    return choices[wanted]


def _triton_available(device: torch.device) -> str | None:
    if _short_sequence() == 0:
        return "it is switched off (PERA_SHORT_ATTENTION=1 switches it on)"
    return backend.needs_triton(device)


backend.register("attention", "triton", available=_triton_available)
for _name, _module in _WHOLE.items():
    backend.register("attention", _name, available=_module.available)


def _first(names: Sequence[str], qkv: Tensor, num_heads: int) -> Any:
    """The first of the named implementations that runs on the device of qkv and takes its dtype and shape."""
    for name in names:
        module = _WHOLE[name]
        if module.available(qkv.device) is None and module.why_not(qkv, num_heads) is None:
            return module
    return sdpa.formula


def _plan(qkv: Tensor, num_heads: int, groups: Sequence[int]) -> list[tuple[Any, list[int]]]:
    """Who takes which groups: (implementation, groups), one after the other as they are packed."""
    name, names = backend.choose("attention", qkv.device), list(_WHOLE)
    if name != "triton":
        return [(_first(names[names.index(name) :], qkv, num_heads), list(groups))]
    from . import triton

    whole, longest = _first(names, qkv, num_heads), _short_sequence()
    if triton.why_not(qkv, num_heads) is not None:
        return [(whole, list(groups))]
    plan: list[tuple[Any, list[int]]] = []
    for count, length in pairs(groups):
        module = triton if length <= longest else whole
        if not plan or plan[-1][0] is not module:
            plan.append((module, []))
        plan[-1][1].extend((count, length))
    return plan


def implementations(
    device: torch.device, dtype: torch.dtype, num_heads: int, head_dim: int, lengths: Sequence[int]
) -> dict[int, str]:
    """Name of the implementation that runs for sequences of each length on a device."""
    qkv = torch.empty(0, 3 * num_heads * head_dim, dtype=dtype, device=device)
    names = {id(module): name for name, module in _WHOLE.items()}
    return {n: names.get(id(_plan(qkv, num_heads, [1, n])[0][0]), "triton") for n in lengths}


def passed_over(device: torch.device, dtype: torch.dtype, num_heads: int, head_dim: int) -> dict[str, str]:
    """Reasons why implementations that come before the one that runs on a device do not run, by name.

    The Triton kernels, which run beside another one, and those for the other kind of device are not among them.
    """
    qkv = torch.empty(0, 3 * num_heads * head_dim, dtype=dtype, device=device)
    asked, names = backend.wanted("attention"), list(_WHOLE)
    found: dict[str, str] = {}
    for other in names[names.index(asked) if asked in names else 0 :]:
        reason = _WHOLE[other].available(device) or _WHOLE[other].why_not(qkv, num_heads)
        if reason is None:
            break
        if other not in (_ON_CPU if device.type == "cuda" else _ON_GPU):
            found[other] = reason
    return found


def _runs(qkv: Tensor, num_heads: int, groups: Sequence[int]) -> Iterator[tuple[Any, slice, list[int]]]:
    """The plan with the rows of each entry, without those that have none."""
    first = 0
    for module, part in _plan(qkv, num_heads, groups):
        last = first + num_tokens(part)
        if last > first:
            yield module, slice(first, last), part
        first = last


@torch.library.custom_op("pera::attention", mutates_args=())
def _attention(qkv: Tensor, num_heads: int, groups: Sequence[int]) -> tuple[Tensor, Tensor]:
    qkv = qkv.contiguous()
    lse = qkv.new_empty(qkv.shape[0], num_heads, dtype=_wide(qkv))
    runs = list(_runs(qkv, num_heads, groups))
    if len(runs) == 1:  # then an implementation's own output need not be copied
        module, _, part = runs[0]
        return module.forward(Packed(qkv, num_heads, part), None, lse), lse
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    for module, rows, part in runs:
        y = module.forward(Packed(qkv[rows], num_heads, part), out[rows], lse[rows])
        if y.data_ptr() != out[rows].data_ptr():
            out[rows] = y
    return out, lse


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@_attention.register_fake
def _(qkv: Tensor, num_heads: int, groups: Sequence[int]) -> tuple[Tensor, Tensor]:
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    return out, qkv.new_empty(qkv.shape[0], num_heads, dtype=_wide(qkv))


@torch.library.custom_op("pera::attention_backward", mutates_args=())
def _backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, groups: Sequence[int]) -> Tensor:
    grad, qkv, out, lse = (t.contiguous() for t in (grad, qkv, out, lse))
    grad_qkv = torch.empty_like(qkv)
    for module, rows, part in _runs(qkv, num_heads, groups):
        attended = Attended(out[rows], lse[rows])
        module.backward(grad[rows], Packed(qkv[rows], num_heads, part), attended, grad_qkv[rows])
    return grad_qkv


@_backward.register_fake
def _(grad, qkv, out, lse, num_heads, groups):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    qkv, ctx.num_heads, ctx.groups = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse)


def _autograd(ctx, grad: Tensor, _lse: Tensor):
    qkv, out, lse = ctx.saved_tensors
    return _backward(grad.contiguous(), qkv, out, lse, ctx.num_heads, ctx.groups), None, None


_attention.register_autograd(_autograd, setup_context=_setup_context)


def attention(qkv: Tensor, num_heads: int, groups: Sequence[int]) -> Tensor:
    """Softmax attention within each packed sequence: ``softmax(q k' / sqrt(d)) v``.

    Args:
        qkv: packed projections [T, 3 * D], contiguous: queries, keys, values, each as heads x head_dim.
        num_heads: heads H; H divides D.
        groups: [n0, len0, n1, len1, ...], see ``pera_kernels.packing``; sequences never attend to each other.

    Returns:
        [T, D] in the dtype of qkv. Scores and sums are float32 (float64 for float64).

    Raises:
        ValueError: the width is not 3 * D with D a multiple of num_heads, or groups do not hold T tokens.
    """
    if qkv.ndim != 2 or qkv.shape[1] % (3 * num_heads):
        raise ValueError(f"qkv {tuple(qkv.shape)} must be [T, 3 * D] with D a multiple of num_heads = {num_heads}")
    check(qkv, None, groups, ())
    return _attention(qkv.contiguous(), num_heads, list(groups))[0]


def attention_with_lse(qkv: Tensor, num_heads: int, groups: Sequence[int]) -> tuple[Tensor, Tensor]:
    """As ``attention``, with the log-sum-exp of each query's scores [T, H] (float32, float64 for float64).

    cuDNN's implementation leaves a group's log-sum-exps in its own layout, [n, H, len]: its backward pass reads them.
    Not differentiable: ``attention_backward_with_sums`` is its gradient.
    """
    return _attention(qkv, num_heads, list(groups))


@torch.library.custom_op("pera::attention_backward_with_sums", mutates_args=())
def _backward_with_sums(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, groups: Sequence[int]
) -> tuple[Tensor, Tensor]:
    grad, qkv, out, lse = (t.contiguous() for t in (grad, qkv, out, lse))
    grad_qkv = torch.empty_like(qkv)
    sums = _column_sums(grad_qkv, len(groups) // 2)
    for module, rows, part in _runs(qkv, num_heads, groups):
        attended = Attended(out[rows], lse[rows])
        given = grad[rows], Packed(qkv[rows], num_heads, part), attended, grad_qkv[rows]
        if module is cudnn:
            cudnn.backward(*given, sums)
            continue
        module.backward(*given)
        if sums is not None:
            sums.add(grad_qkv[rows])
    return grad_qkv, column_sums(grad_qkv) if sums is None else sums.total()


@_backward_with_sums.register_fake
def _(grad, qkv, out, lse, num_heads, groups):
    sums = qkv.new_empty(qkv.shape[1], dtype=_wide(qkv))
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), sums


def _column_sums(x: Tensor, parts: int) -> Any:
    """A sum of the columns of x that is taken while x is written, in so many parts at most; None without Triton."""
    if x.dtype == torch.float64 or backend.needs_triton(x.device) is not None:
        return None
    from .triton import ColumnSums

    return ColumnSums(parts, x)


def attention_backward_with_sums(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, groups: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Gradient of qkv [T, 3 * D] and its column sums [3 * D]: the gradient of the projection's bias.

    Args:
        grad: gradient of the result [T, D].
        qkv, num_heads, groups: as for ``attention``.
        out, lse: what ``attention_with_lse`` returned.

    Returns:
        The sums are float32 (float64 for float64).
    """
    return _backward_with_sums(grad, qkv, out, lse, num_heads, list(groups))


@torch.library.custom_op("pera::attention_parts", mutates_args=())
def _parts(qkv: Tensor, num_heads: int, groups: Sequence[int]) -> list[Tensor]:
    qkv = qkv.contiguous()
    lse = qkv.new_empty(qkv.shape[0], num_heads, dtype=_wide(qkv))  # written by all but cuDNN's, read by nobody
    return [
        module.forward(Packed(qkv[rows], num_heads, part), None, None if module is cudnn else lse[rows])
        for module, rows, part in _runs(qkv, num_heads, groups)
    ]


@_parts.register_fake
def _(qkv, num_heads, groups):
    return [qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)]


cost.opened(
    "pera::attention", "pera::attention_backward", "pera::attention_backward_with_sums", "pera::attention_parts"
)


def attention_parts(qkv: Tensor, num_heads: int, groups: Sequence[int]) -> list[Tensor]:
    """As ``attention``, in as many tensors as implementations make it: their rows follow one another.

    For a caller that reads them one by one, such as the next projection: nothing is copied together. It is not
    differentiable.
    """
    return _parts(qkv, num_heads, list(groups))
