"""Mask tokens that join the packed global sequences at mid-depth."""

from .op import mask_tokens

__all__ = ["mask_tokens"]
