"""Embeds folders of images with frozen weights, and finds the images that are most alike.

`run.embed` and `similar.similar` are the entries; `pera_fast.cli_embed` calls them.
"""
