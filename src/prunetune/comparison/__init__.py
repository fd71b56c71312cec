"""Methods side by side on one recipe."""
