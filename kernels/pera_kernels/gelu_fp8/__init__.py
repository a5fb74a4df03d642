"""GELU and quantisation to FP8, in one pass; for networks without gradients."""

from .op import gelu_fp8

__all__ = ["gelu_fp8"]
