"""The command line: commands, their flags, what they print, and exit codes."""
