"""`python -m prunetune.cli`, as launchers of several processes start it."""

from prunetune.cli.app import main

main()
