"""Matrix products in the dtype that the device is fast in."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from .isa import Isa, isa
from .transposed import transposed

_always_half = False
# Rows of a gradient from which a transposed copy of it pays for itself: see the README of transposed.
TRANSPOSED_ROWS = 768


def _fast_on_this_cpu() -> frozenset[torch.dtype]:
    """The half types for whose products this CPU has instructions."""
    has = {
        torch.bfloat16: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
        torch.float16: torch.cpu._is_amx_fp16_supported(),
    }
    return frozenset(dtype for dtype, fast in has.items() if fast)


# Found once, here, as torch.compile cannot trace the question. Marking the answer as a constant for torch.compile would
# load the compiler, which takes longer than to import the rest of torch.
_FAST_ON_CPU = _fast_on_this_cpu()


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype in which matrix products of operands of that dtype run.

    It is the operands' own, except for half types on a CPU without instructions for them: there the emulated product
    takes four times as long as the float32 one, which is also the more precise.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and device.type == "cpu" and not _always_half and dtype not in _FAST_ON_CPU else dtype


@contextmanager
def half_products() -> Iterator[None]:
    """While the block runs, for all threads: products in half types on any CPU. For simulations of another device."""
    global _always_half
    before, _always_half = _always_half, True
    try:
        yield
    finally:
        _always_half = before


def in_dtype(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter in a dtype: its compute copy where it has one that is up to date, else a cast.

    A compute copy is a half-precision copy that the optimiser's pass writes together with the parameter, as the
    attribute ``compute_copy``. The attribute ``compute_copy_version`` is the parameter's version counter at the time
    when both were equal, so whoever else writes to the parameter makes the copy stale.
    """
    if parameter.dtype == dtype or torch.compiler.is_compiling():
        return parameter.to(dtype)
    copy = getattr(parameter, "compute_copy", None)
    if copy is None or copy.dtype != dtype or getattr(parameter, "compute_copy_version", None) != parameter._version:
        return parameter.to(dtype)
    return copy


def matmul(a: Tensor, b: Tensor, rows: slice | None = None) -> Tensor:
    """``a @ b`` in the dtype of a, whatever that of b; computed in ``product_dtype``.

    Args:
        a: [..., M, K].
        b: [..., K, N]; cast.
        rows: of b; None: all.
    """
    dtype = product_dtype(a.dtype, a.device)
    return (a.to(dtype) @ in_dtype(b, dtype)[rows or slice(None)]).to(a.dtype)


def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``a @ b`` into ``out``, which may be float32 for half types: accumulated and kept in float32 on a GPU.

    Elsewhere the product is rounded to the dtype of a first.
    """
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    return out.copy_(torch.mm(a, b))


def _on_tiles(x: Tensor) -> bool:
    """Whether the products of x [R, C] run in the tiles of a CPU: so fast that passes over the operands count."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and not _always_half
        and isa() == Isa.AMX
        and not torch.compiler.is_compiling()
    )


@cache
def _adds_bias() -> bool:
    """Whether oneDNN has a product of bfloat16 with a bias, which its own limit (ONEDNN_MAX_CPU_ISA) may forbid."""
    ops = torch.ops.mkldnn
    needed = "_linear_pointwise", "_is_mkldnn_bf16_supported"
    return all(hasattr(ops, name) for name in needed) and ops._is_mkldnn_bf16_supported()


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad' x``, the gradient of a linear layer's weight, accumulated in float32 and rounded to dtype once.

    Args:
        grad: gradient of the layer's result [T, out].
        x: its argument [T, in], dtype of grad.
        dtype: of the weight.

    Returns:
        [out, in]. Half types on a GPU give a float32 result straight from the product.
    """
    if grad.is_cuda and dtype == torch.float32 and grad.dtype in (torch.bfloat16, torch.float16):
        return torch.ops.aten.mm.dtype(grad.t(), x, torch.float32)
    product = product_dtype(grad.dtype, grad.device)
    if grad.shape[0] >= TRANSPOSED_ROWS and _on_tiles(grad):
        return (transposed(grad) @ x).to(dtype)  # oneDNN reads a transposed left operand at half the speed
    return (grad.to(product).t() @ x.to(product)).to(dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, rows: slice | None = None) -> Tensor:
    """``x W' + b`` in the dtype of x; weight and bias are cast; computed in ``product_dtype``.

    Args:
        x: [T, in].
        weight: [out, in].
        bias: [out] or None.
        rows: of weight and bias, whose results are wanted; None: all.
    """
    dtype = product_dtype(x.dtype, x.device)
    weight, bias = in_dtype(weight, dtype), None if bias is None else in_dtype(bias, dtype)
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    if bias is not None and _on_tiles(x) and _adds_bias():
        # The bias in the product itself; PyTorch's linear writes it into the result first, and adds to that.
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    out = torch.nn.functional.linear(x.to(dtype), weight, bias)
    # Not converted where there is nothing to convert: under torch.compile of PyTorch 2.11 an autograd.Function whose
    # result is what a conversion returned unchanged has no gradient.
    return out if out.dtype == x.dtype else out.to(x.dtype)


def linear_of_parts(parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear`` of rows that come in several tensors [T_i, in], in one [sum(T_i), out]; not differentiable."""
    if len(parts) == 1:
        return linear(parts[0], weight, bias)
    first = parts[0]
    dtype = product_dtype(first.dtype, first.device)
    if dtype != first.dtype or bias is not None:
        return torch.cat([linear(part, weight, bias) for part in parts])
    out = first.new_empty(sum(part.shape[0] for part in parts), weight.shape[0])
    matrix = in_dtype(weight, dtype).t()
    for part, rows in zip(parts, out.split([part.shape[0] for part in parts]), strict=True):
        torch.mm(part, matrix, out=rows)
    return out
