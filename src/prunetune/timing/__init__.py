"""How long a plan takes on this device: a table measured width by width, kept in the cache, and the proof of it."""
