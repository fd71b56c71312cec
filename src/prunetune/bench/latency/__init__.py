"""Latency tables: what layers of each width take on this device."""
