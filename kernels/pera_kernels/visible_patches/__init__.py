"""Ops `contrast_mean` and `visible_patches`, which turn uint8 crops into normalised rows of the visible patches."""

from .op import contrast_mean, visible_patches

__all__ = ["contrast_mean", "visible_patches"]
