"""Training: schedules, optimiser, checkpoints, metrics and the loop that joins them; `train.api.pretrain` runs it."""
