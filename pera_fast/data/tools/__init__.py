"""Commands on data sets: pack into shards, tile large scenes, find duplicates, measure bands.

``pera_fast.cli_data`` calls each of them; nothing else does.
"""
