"""How fast a model answers: `prunetune bench` and the short measure of a run."""
