"""Compares methods: many runs of one recipe over budgets, seeds and learning rates, in one table and one page."""
