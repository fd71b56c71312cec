"""`python -m prunetune`."""

from prunetune.cli import main

main()
