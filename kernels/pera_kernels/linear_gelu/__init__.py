"""A linear layer with its GELU as one op, and the gradient through the GELU and the next layer."""

from .op import linear_gelu, linear_gelu_backward

__all__ = ["linear_gelu", "linear_gelu_backward"]
