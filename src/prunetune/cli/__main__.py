"""`python -m prunetune.cli`, the module that launchers of several processes start."""

from prunetune.cli.app import main

main()
