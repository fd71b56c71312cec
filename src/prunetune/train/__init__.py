"""Training: the loop, its generator and adapter trainers, their passes, losses, checkpoints and limits."""
