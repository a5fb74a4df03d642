"""Feeds the trainer with batches of crops, decoded ahead by DALI on the GPU or on CPU threads.

The trainer, the demo and the benches iterate over its ``Loader``.
"""
