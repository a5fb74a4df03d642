"""Residual add and the LayerNorm after it, in one pass over the stream."""

from .op import add_norm, add_norm_, add_norm_backward

__all__ = ["add_norm", "add_norm_", "add_norm_backward"]
