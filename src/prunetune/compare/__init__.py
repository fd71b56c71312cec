"""Many runs of one recipe side by side."""
