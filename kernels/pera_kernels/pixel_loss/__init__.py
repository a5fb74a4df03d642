"""Op `pixel_loss`: predicted pixels against the crop's own, without a target in memory."""

from .op import pixel_loss

__all__ = ["pixel_loss"]
