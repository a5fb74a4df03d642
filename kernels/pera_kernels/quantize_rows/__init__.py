"""Quantisation to FP8 with a scale for each row, of activations and of weights."""

from .op import Slot, WeightQuantizer, quantize_parts, quantize_rows

__all__ = ["Slot", "WeightQuantizer", "quantize_parts", "quantize_rows"]
