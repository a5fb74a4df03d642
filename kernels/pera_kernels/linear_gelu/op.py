"""linear_gelu: one kernel where that was measured to be faster, else a product and ``pera_kernels.gelu``."""

import torch
from torch import Tensor

from .. import backend, cost, products
from ..gelu import gelu, gelu_, gelu_backward_
from . import measured


def _available(device: torch.device) -> str | None:
    if reason := backend.needs_triton(device):
        return reason
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < (9, 0):
        return "its tiles need the tensor memory accelerator, compute capability 9.0"
    if backend.wanted("linear_gelu") != "triton" and not any(capability in rows for rows in measured.FASTER.values()):
        return f"not measured to be faster on compute capability {capability[0]}.{capability[1]}"
    return None


backend.register("linear_gelu", "triton", available=_available)
backend.register("linear_gelu", "products")


@torch.library.custom_op("pera::linear_gelu", mutates_args=())
def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, with_hidden: bool) -> tuple[Tensor, Tensor]:
    from . import triton

    return triton.linear_gelu(x.contiguous(), weight.contiguous(), bias.contiguous(), with_hidden)


@_linear_gelu.register_fake
def _(x, weight, bias, with_hidden):
    rows, width = x.shape[0], weight.shape[0]
    return x.new_empty(rows, width), x.new_empty(rows if with_hidden else 0, width)


@torch.library.custom_op("pera::linear_gelu_backward", mutates_args=())
def _linear_gelu_backward(grad: Tensor, weight: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    from . import triton

    return triton.linear_gelu_backward(grad.contiguous(), weight.contiguous(), hidden.contiguous())


@_linear_gelu_backward.register_fake
def _(grad, weight, hidden):
    return torch.empty_like(hidden), hidden.new_empty(hidden.shape[1], dtype=torch.float32)


@cost.of("pera::linear_gelu")
def _(result, x, weight, bias, _with_hidden):
    flops = 2.0 * x.numel() * weight.shape[0]
    return [cost.Cost(1, cost.size(x, weight, bias, result), flops, "gelu products", x.dtype)]


@cost.of("pera::linear_gelu_backward")
def _(result, grad, weight, hidden):
    flops = 2.0 * grad.numel() * weight.shape[1]
    product = cost.Cost(1, cost.size(grad, weight, hidden, result[0]), flops, "gelu products", grad.dtype)
    return [product, cost.Cost(bytes=cost.size(result[1]))]


def _fused(what: str, x: Tensor, width: int) -> bool:
    """Whether the Triton kernel runs: where it is forced, or was measured to be faster for what is computed."""
    if backend.choose("linear_gelu", x.device) != "triton":
        return False
    forced = backend.wanted("linear_gelu") == "triton"
    if x.is_cuda and not forced and torch.cuda.get_device_capability(x.device) not in measured.FASTER[what]:
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
    if _fused("gelu(h), h" if with_hidden else "gelu(h)", x, weight.shape[0]):
        dtype = x.dtype
        return _linear_gelu(x, products.in_dtype(weight, dtype), products.in_dtype(bias, dtype), with_hidden)
    hidden = products.linear(x, weight, bias)
    return (gelu(hidden), hidden) if with_hidden else (gelu_(hidden), hidden[:0])


def linear_gelu_backward(
    grad: Tensor, weight: Tensor, hidden: Tensor, with_act: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of h from that of ``gelu(h) W'``, the result of the layer after the GELU.

    Args:
        grad: gradient of that layer's result [M, K].
        weight: [K, N], of that layer; cast to the dtype of grad.
        hidden: h [M, N], dtype of grad.
        with_act: also compute gelu(h) again.

    Returns:
        Gradient of h [M, N]; its column sums [N] before it is rounded, float32 (float64 for float64): the gradient of
        the bias in h; gelu(h) [M, N], or [0, N] without ``with_act``.
    """
    if not with_act and _fused("gradient", grad, weight.shape[1]):
        return *_linear_gelu_backward(grad, products.in_dtype(weight, grad.dtype), hidden), hidden[:0]
    grad_hidden = products.matmul(grad, weight)
    act, sums = gelu_backward_(grad_hidden, hidden, with_act)
    return grad_hidden, sums, act
