"""Training: the loop, the trainers of weights and generator, their passes, losses, checkpoints and limits."""
