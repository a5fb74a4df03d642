"""Reads and decodes one image file or tar member, with DALI, GDAL, Pillow or imagecodecs, in sandboxed processes.

The index probes files with it, ``reading`` gets rasters from it, and the loader's pipeline takes DALI's settings from
it.
"""
