"""Paints procedural remote-sensing scenes, labelled by class.

The demo and the benches use them where no images are given.
"""
