"""Memory and speed of a training step, before renting the hardware."""
