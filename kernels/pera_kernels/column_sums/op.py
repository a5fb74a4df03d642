"""pera::column_sums: schema, shapes, implementations."""

import torch
from torch import Tensor

from .. import backend, cost
from ..packing import HALF_OR_SINGLE
from .reference import column_sums as definition

backend.register("column_sums", "triton", available=backend.needs_triton)
backend.register("column_sums", "native", available=backend.needs_native("column_sums"))
backend.register("column_sums", "pytorch")


@torch.library.custom_op("pera::column_sums", mutates_args=())
def _column_sums(x: Tensor) -> Tensor:
    kernels = backend.kernels("column_sums", x) if x.numel() else None
    return definition(x) if kernels is None else kernels.column_sums(x)


@_column_sums.register_fake
def _(x):
    return x.new_empty(x.shape[1], dtype=torch.float32)


@cost.of("pera::column_sums")
def _(result, x):
    return [cost.Cost(bytes=cost.size(x)), cost.Cost(bytes=cost.size(result))]


def column_sums(x: Tensor) -> Tensor:
    """Sums over the rows of x [R, C]: float32 [C] (float64 for float64). Not differentiable."""
    return _column_sums(x) if x.dtype in HALF_OR_SINGLE and x.ndim == 2 else definition(x)
