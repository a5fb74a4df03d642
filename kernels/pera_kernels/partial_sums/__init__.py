"""Adds up the partial sums of a Triton kernel's programs, in one launch and in a fixed order."""
