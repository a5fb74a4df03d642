"""The method: disjoint masks, a vision transformer on packed tokens, heads, losses, student and teacher."""
