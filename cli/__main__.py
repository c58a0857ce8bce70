"""`python -m eigenwatch.cli`, for a process that cannot count on a PATH."""

from . import main

main()
