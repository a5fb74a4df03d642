"""Curves of runs, from metrics.jsonl: read in chunks, thinned, drawn."""
