"""Rows scaled to unit length."""

from .op import unit_rows

__all__ = ["unit_rows"]
