"""Matrix products in FP8: e4m3 operands with a float32 scale for each row.

A row of activations, and a row of a weight (an output channel), is divided by its scale, so that its largest magnitude
becomes the largest number of e4m3; ``torch._scaled_mm`` multiplies the scales back. Nothing here has a gradient.
"""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from . import backend, products

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3's numbers
SMALLEST = 1e-30  # taken for a row's largest magnitude if that is less: the scale of a row of zeros divides
CAPABILITY = (8, 9)


class Rows(NamedTuple):
    """A matrix in e4m3.

    Attributes:
        values: e4m3 [R, C].
        scale: float32 [R, 1]: the matrix is ``values * scale``.
    """

    values: Tensor
    scale: Tensor


def why_not(device: torch.device) -> str | None:
    """Why a device has no FP8 products, or None; one clause."""
    if device.type != "cuda":
        return None if device.type == "cpu" else f"FP8 products run on a GPU or a CPU, not on {device.type}"
    found = torch.cuda.get_device_capability(device)
    if found >= CAPABILITY:
        return None
    name = torch.cuda.get_device_name(device)
    return (
        f"FP8 products need compute capability 8.9 or newer (Ada, Hopper, Blackwell), {name} has {found[0]}.{found[1]}"
    )


def needs_triton(device: torch.device) -> str | None:
    """A check for ``backend.register``: Triton runs, and the device converts to e4m3."""
    return backend.needs_triton(device) or (why_not(device) if device.type == "cuda" else None)


def kernel_dtype() -> torch.dtype:
    """Dtype that a kernel writes: e4m3, or float32 in Triton's interpreter.

    The interpreter drops the carry of numbers that are rounded up to a power of two; PyTorch rounds them there.
    """
    return torch.float32 if os.environ.get("TRITON_INTERPRET") == "1" else E4M3


def linear(x: Rows, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """``x W' + b``, accumulated in float32 (as far as fast accumulation is that), rounded to a dtype once.

    Args:
        x: [T, in].
        weight: [out, in], a parameter: its FP8 copy is taken, see ``in_e4m3``.
        bias: [out] or None; cast.
        dtype: of the result [T, out]; a GPU gives bfloat16 only.
    """
    w = in_e4m3(weight)
    bias = None if bias is None else products.in_dtype(bias, dtype)
    return torch._scaled_mm(
        x.values, w.values.t(), x.scale, w.scale.t(), bias=bias, out_dtype=dtype, use_fast_accum=True
    )


def in_e4m3(weight: Tensor) -> Rows:
    """A weight [out, in] in e4m3: its FP8 copy where it has one that is up to date, else quantised here.

    The copy is the attribute ``fp8_copy``, and ``fp8_copy_version`` the weight's version counter when it was made.
    """
    if not torch.compiler.is_compiling():
        copy = getattr(weight, "fp8_copy", None)
        if copy is not None and getattr(weight, "fp8_copy_version", None) == weight._version:
            return copy
    from .quantize_rows import quantize_rows

    return quantize_rows(weight)
