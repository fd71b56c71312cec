"""A run's folder, and who reads it: history, list, diff, live view, trackers."""
