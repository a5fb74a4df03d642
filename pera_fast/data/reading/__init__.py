"""Turns a row of the manifest into a decoded raster, reduced where the crops allow it.

The loader's threads and the measurement of band ranges call it.
"""
