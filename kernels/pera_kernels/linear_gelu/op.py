"""linear_gelu: one kernel where it was measured to be faster, else a product and ``pera_kernels.gelu``."""

import torch
from torch import Tensor

from .. import backend, products
from ..gelu import gelu, gelu_
from . import measured


def _triton_available(device: torch.device) -> str | None:
    if reason := backend.needs_triton(device):
        return reason
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < (9, 0):
        return "its tiles need the tensor memory accelerator, compute capability 9.0"
    if backend.wanted("linear_gelu") != "triton" and capability not in measured.FASTER:
        return f"not measured to be faster on compute capability {capability[0]}.{capability[1]}"
    return None


backend.register("linear_gelu", "triton", available=_triton_available)
backend.register("linear_gelu", "products")


@torch.library.custom_op("pera::linear_gelu", mutates_args=())
def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, with_hidden: bool) -> tuple[Tensor, Tensor]:
    from . import triton

    return triton.linear_gelu(x.contiguous(), weight.contiguous(), bias.contiguous(), with_hidden)


@_linear_gelu.register_fake
def _(x, weight, bias, with_hidden):
    rows, width = x.shape[0], weight.shape[0]
    return x.new_empty(rows, width), x.new_empty(rows if with_hidden else 0, width)


def _fused(x: Tensor, width: int) -> bool:
    if backend.choose("linear_gelu", x.device) != "triton":
        return False
    from . import triton

    return triton.why_not(x, width) is None


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, with_hidden: bool = False) -> tuple[Tensor, Tensor]:
    """``gelu(h)`` of ``h = x W' + b``, and h where a backward pass will want it; not differentiable.

    Args:
        x: [M, K].
        weight: [N, K]; cast to the dtype of x.
        bias: [N]; cast.
        with_hidden: also return h.

    Returns:
        gelu(h) [M, N] and h [M, N], or [0, N] without ``with_hidden``, in the dtype of x. The GELU is the exact one.
    """
    if _fused(x, weight.shape[0]):
        dtype = x.dtype
        return _linear_gelu(x, products.in_dtype(weight, dtype), products.in_dtype(bias, dtype), with_hidden)
    hidden = products.linear(x, weight, bias)
    return (gelu(hidden), hidden) if with_hidden else (gelu_(hidden), hidden[:0])
