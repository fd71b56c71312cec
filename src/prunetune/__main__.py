"""`python -m prunetune`."""

from prunetune.cli.app import main

main()
