"""What every package may use: files, seeds, devices, the terminal."""
