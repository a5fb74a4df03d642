"""Attention of each packed sequence's cls token over its sequence, without making keys and values."""

from .op import cls_attention, takes

__all__ = ["cls_attention", "takes"]
