"""`python -m defeat_cli`."""

from defeat_cli.cli import main

main()
