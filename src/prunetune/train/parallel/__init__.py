"""Training over several ranks: the processes of one launch, sharded weights, passes and checkpoints."""
