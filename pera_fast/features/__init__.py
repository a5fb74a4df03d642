"""Reads labelled images and extracts frozen features; the trainer's probes and every evaluation use them."""
