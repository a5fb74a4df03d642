"""Predicts and measures the memory and speed of a training step."""
