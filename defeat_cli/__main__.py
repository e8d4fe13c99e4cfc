"""`python -m defeat_cli`."""

from defeat_cli.commands.app import main

main()
