"""Weights from and to other codebases."""
