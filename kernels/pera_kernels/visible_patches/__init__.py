"""Ops `contrast_mean` and `visible_patches`: from uint8 crops to normalised rows of the patches that are seen."""

from .op import contrast_mean, visible_patches

__all__ = ["contrast_mean", "visible_patches"]
