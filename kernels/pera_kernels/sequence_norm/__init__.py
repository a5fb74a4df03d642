"""LayerNorm of a gathered subset of packed sequences."""

from .op import sequence_norm

__all__ = ["sequence_norm"]
