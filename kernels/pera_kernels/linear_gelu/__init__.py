"""GELU of a linear layer's result, as one op."""

from .op import linear_gelu

__all__ = ["linear_gelu"]
