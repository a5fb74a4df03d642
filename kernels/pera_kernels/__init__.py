"""Operators of sparse two-view pretraining: one folder an operator, usable without the trainer."""

__version__ = "0.2.0"
