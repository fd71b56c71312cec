"""Scores of a model on rows: choices, generated answers, NLL and perplexity, with standard errors."""
