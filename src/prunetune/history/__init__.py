"""Runs over time: registered, listed, and set beside each other."""

from prunetune.history.store import Entry, entered, entries

__all__ = ["Entry", "entered", "entries"]
