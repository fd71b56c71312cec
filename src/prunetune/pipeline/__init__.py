"""A whole run, from recipe to report."""
