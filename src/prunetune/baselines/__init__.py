"""Two-stage methods: one scoring function each."""
