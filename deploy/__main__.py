"""`python -m deploy` is the `opdlm` command where the package is not installed."""

from deploy.cli import main

main()
