"""Heads: an MLP to an L2-normalised bottleneck, then a weight-normalised linear layer (docs/method.md section 4.6)."""

import torch
from torch import Tensor, nn
from torch.nn.init import trunc_normal_, zeros_

from pera_kernels.unit_rows import unit_rows

from .linear import gelu_linear, linear


class WeightNormLinear(nn.Module):
    """Holder of a weight-normalised linear layer without bias: effective row = g * v / ||v||, g starts at 1."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach())  # default linear init
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x [R, in] -> [R, out]; for small layers, the prototypes go through their own operators."""
        return linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))  # one kernel, as nn.utils.weight_norm


def _mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    layers = nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        nn.GELU(),
        nn.Linear(hidden_dim, hidden_dim),
        nn.GELU(),
        nn.Linear(hidden_dim, out_dim),
    )
    for layer in layers:
        if isinstance(layer, nn.Linear):
            trunc_normal_(layer.weight, std=0.02)
            zeros_(layer.bias)
    return layers


def _bottleneck(mlp: nn.Sequential, x: Tensor) -> Tensor:
    """MLP and L2 normalisation in the dtype of x, with the published eps: 1e-12 in float32, 1e-6 in half types."""
    first, second, third = (layer for layer in mlp if isinstance(layer, nn.Linear))
    x = linear(x, first.weight, first.bias, bias_gradient=False)
    x = gelu_linear(x, first.bias, second.weight, second.bias, bias_gradient=False)
    x = gelu_linear(x, second.bias, third.weight, third.bias)
    eps = 1e-6 if x.dtype in (torch.float16, torch.bfloat16) else 1e-12
    return unit_rows(x, eps)


class ClsHead(nn.Module):
    """MLP in -> hidden -> hidden -> bottleneck and the prototypes, which the loss operators use without logits."""

    def __init__(self, in_dim: int, hidden_dim: int, bottleneck: int, prototypes: int):
        super().__init__()
        self.mlp = _mlp(in_dim, hidden_dim, bottleneck)
        self.last_layer = WeightNormLinear(bottleneck, prototypes)

    def forward(self, x: Tensor) -> Tensor:
        """cls rows [N, D] -> unit rows [N, bottleneck]."""
        return _bottleneck(self.mlp, x)


class _MlpHolder(nn.Module):
    """Gives the pixel head's MLP the published parameter names (mlp0.mlp.*)."""

    def __init__(self, in_dim: int, hidden_dim: int, bottleneck: int):
        super().__init__()
        self.mlp = _mlp(in_dim, hidden_dim, bottleneck)


class PixelHead(nn.Module):
    """Predicted tokens to pixels of their patch, element order (row, column, channel)."""

    def __init__(self, in_dim: int, hidden_dim: int, bottleneck: int, out_dim: int):
        super().__init__()
        self.mlp0 = _MlpHolder(in_dim, hidden_dim, bottleneck)
        self.last_layer = WeightNormLinear(bottleneck, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[R, D] -> [R, P * P * C]."""
        return self.last_layer(_bottleneck(self.mlp0.mlp, x))
