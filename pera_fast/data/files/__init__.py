"""Knows which files a data set has: its manifest, folder scan, tar shards and the list of skipped files.

Every other room of ``pera_fast.data`` that handles more than one file takes its rows from here.
"""
