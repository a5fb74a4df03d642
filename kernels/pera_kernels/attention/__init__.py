"""Self-attention over packed sequences of several lengths."""

from .op import attention

__all__ = ["attention"]
