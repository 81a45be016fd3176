"""`python -m kvrelay` is `kvrelay`."""

from kvrelay.cli import main

main()
