"""From scores or a generator to a plan under a budget."""
