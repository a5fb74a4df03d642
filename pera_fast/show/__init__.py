"""Draws a contact sheet of the samples that a run would see, with their crops and masks.

``pera-fast data show`` calls it, and the demo's report uses its panels.
"""
