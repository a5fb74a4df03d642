"""Draws what is random about a sample: its place in the epoch, its crops and colours, and its patch masks.

The loader and the trainer's inputs call it; every draw is keyed by seed, epoch and sample, so a resumed run repeats it.
"""
