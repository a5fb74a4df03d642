"""Self-attention over packed sequences of several lengths."""

from .op import attention, implementations

__all__ = ["attention", "implementations"]
