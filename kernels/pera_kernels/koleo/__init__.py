"""KoLeo on prototype logits without [B, K] logits, and its cheap alternative on the rows themselves."""

from .op import koleo, koleo_rows

__all__ = ["koleo", "koleo_rows"]
