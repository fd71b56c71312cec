"""A run's folder and its readers: history, list, comparison, live view, trackers."""
