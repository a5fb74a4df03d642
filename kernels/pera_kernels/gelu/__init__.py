"""Exact GELU, and its gradient together with the column sums that the layer before it needs."""

from .op import gelu, gelu_, gelu_backward_

__all__ = ["gelu", "gelu_", "gelu_backward_"]
