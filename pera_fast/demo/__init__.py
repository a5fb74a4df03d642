"""The demo: procedural scenes, a short pretraining, and one report that shows the result."""
