"""Projection, position embedding and cls token of the visible patches, packed."""

from .op import embed_tokens

__all__ = ["embed_tokens"]
