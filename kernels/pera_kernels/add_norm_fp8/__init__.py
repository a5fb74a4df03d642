"""Residual add, LayerNorm and quantisation to FP8, in one pass over the stream; for networks without gradients."""

from .op import add_norm_fp8_

__all__ = ["add_norm_fp8_"]
