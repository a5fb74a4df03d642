"""Training: schedules, optimiser, checkpoints, metrics and the loop; `train.api.pretrain` is the entry point."""
