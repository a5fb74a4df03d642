"""Evaluation of frozen features: scene classification, semantic segmentation, change detection."""

from pera_fast.eval.run import Entry, Evaluation, evaluate

__all__ = ["Entry", "Evaluation", "evaluate"]
