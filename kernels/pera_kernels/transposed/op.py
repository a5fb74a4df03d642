"""pera::transposed: schema and shapes; a native kernel for 16-bit values on CPUs with AVX-512, else the definition."""

import torch
from torch import Tensor

from .. import backend, cost
from ..isa import Isa, isa
from .reference import transposed as definition

_built = backend.needs_native("transposed")


def _available(device: torch.device) -> str | None:
    if device.type == "cpu" and isa() < Isa.AVX512:
        return "this processor has no AVX-512, or PERA_MAX_ISA leaves it out"
    return _built(device)


backend.register("transposed", "avx512", available=_available)
backend.register("transposed", "pytorch")


@torch.library.custom_op("pera::transposed", mutates_args=())
def _transposed(x: Tensor) -> Tensor:
    """Rows of the result are filled up to a multiple of 32 values, with anything."""
    return torch.ops.pera_native.transposed(x)


@_transposed.register_fake
def _(x):
    return x.new_empty(x.shape[1], -(-x.shape[0] // 32) * 32)


@cost.of("pera::transposed")
def _(result, x):
    return [cost.Cost(bytes=cost.size(x, result))]


def transposed(x: Tensor) -> Tensor:
    """The transpose of a matrix x [R, C] as a copy [C, R] in its dtype; not differentiable.

    The values of a row follow one another in memory; rows may be further apart than R values.
    """
    if backend.choose("transposed", x.device) == "avx512" and x.dtype in (torch.bfloat16, torch.float16):
        return _transposed(x if x.stride(1) == 1 else x.contiguous())[:, : x.shape[0]]
    return definition(x)
