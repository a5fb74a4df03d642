"""Sums of a matrix's columns: the gradient of a bias."""

from .op import column_sums

__all__ = ["column_sums"]
