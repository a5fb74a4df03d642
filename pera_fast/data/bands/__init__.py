"""Decides how stored values become the network's integers: bit depth and value range of each band.

The index and the trainer ask it once for a data set, ``data stats`` and the loader use its answer.
"""
