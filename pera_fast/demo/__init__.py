"""The demonstration: procedural scenes, a short pretraining, and one report that shows what happened."""
