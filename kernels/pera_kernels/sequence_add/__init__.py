"""Scaled addition of a residual branch's result into a subset of packed sequences."""

from .op import sequence_add

__all__ = ["sequence_add"]
