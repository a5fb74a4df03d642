"""GELU of a linear layer's result as one op, and the gradient that comes back through GELU and the layer after it."""

from .op import linear_gelu, linear_gelu_backward

__all__ = ["linear_gelu", "linear_gelu_backward"]
