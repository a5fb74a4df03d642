"""Builds the index of a data folder: checks every file once, resumes after a crash, and notices changed files.

``pera-fast data index``, the trainer and the tools call it before they read any image.
"""
