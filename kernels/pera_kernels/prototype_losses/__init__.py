"""Distillation loss and KoLeo on the same prototypes; the gradients of both take one pass over them."""

from .op import prototype_losses

__all__ = ["prototype_losses"]
