"""Totals of the partial sums that the programs of a Triton kernel leave, in one launch and a fixed order."""
