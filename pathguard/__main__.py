"""`python -m pathguard` is the command `pathguard`."""

from pathguard.cli import main

main()
