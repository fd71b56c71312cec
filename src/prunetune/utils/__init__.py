"""Helpers for every package: files, JSON lines, tables, consoles, failures, seeds, environment, launchers."""
