"""Distillation and KoLeo on the same prototypes, with one walk over them for the gradients of both."""

from .op import prototype_losses

__all__ = ["prototype_losses"]
