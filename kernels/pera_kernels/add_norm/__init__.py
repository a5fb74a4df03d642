"""Residual add and LayerNorm of what follows, in one pass over the stream."""

from .op import add_norm, add_norm_, add_norm_backward

__all__ = ["add_norm", "add_norm_", "add_norm_backward"]
