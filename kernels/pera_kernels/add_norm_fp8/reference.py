"""Definition of add_norm_fp8 in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from ..quantize_rows.reference import quantize_rows


def add_norm_fp8(
    x: Tensor, y: Tensor | None, y_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``pera_kernels.add_norm_fp8``: the sum [T, D], values [T, D] in e4m3, scales [T, 1].

    Half types are widened to float32 around the sum, which is rounded once; the norm starts from the rounded sum and is
    rounded to e4m3 only.
    """
    wide = x.double() if x.dtype.itemsize == 8 else x.float()
    if y is not None:
        wide = wide + y.to(wide.dtype)
    if y_bias is not None:
        wide = wide + y_bias.to(wide.dtype)
    stream = wide.to(x.dtype)
    normed = F.layer_norm(stream.to(wide.dtype), x.shape[1:], weight.to(wide.dtype), bias.to(wide.dtype), eps)
    return stream, *quantize_rows(normed)
