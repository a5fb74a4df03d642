"""Reads a backbone's weights: of a run, an exported folder, a published checkpoint, a timm model or file, or random.

`load.load_backbone` is the entry; everything that evaluates, adapts or exports weights begins with it.
"""
