"""pera::column_sums: schema and shapes; without a GPU the definition runs."""

import torch
from torch import Tensor

from .. import backend, cost
from ..packing import HALF_OR_SINGLE
from .reference import column_sums as definition

backend.register("column_sums", "triton", available=backend.needs_triton)
backend.register("column_sums", "pytorch")


@torch.library.custom_op("pera::column_sums", mutates_args=())
def _column_sums(x: Tensor) -> Tensor:
    from . import triton

    return triton.column_sums(x)


@_column_sums.register_fake
def _(x):
    return x.new_empty(x.shape[1], dtype=torch.float32)


@cost.of("pera::column_sums")
def _(result, x):
    return [cost.Cost(bytes=cost.size(x)), cost.Cost(bytes=cost.size(result))]


def column_sums(x: Tensor) -> Tensor:
    """Sums over the rows of x [R, C]: float32 [C] (float64 for float64). Not differentiable."""
    if backend.choose("column_sums", x.device) == "triton" and x.dtype in HALF_OR_SINGLE and x.ndim == 2:
        return _column_sums(x)
    return definition(x)
