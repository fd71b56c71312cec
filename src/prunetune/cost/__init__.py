"""What a plan costs: parameters, operations, memory, latency."""
