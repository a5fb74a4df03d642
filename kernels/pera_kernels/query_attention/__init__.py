"""Attention of some tokens of each packed sequence over all tokens of their sequence."""

from .op import query_attention, query_attention_backward

__all__ = ["query_attention", "query_attention_backward"]
