"""A matrix with its rows as columns, in memory."""

from .op import transposed

__all__ = ["transposed"]
