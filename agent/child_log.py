"""The log of a child process, bounded: a training runs for weeks, and Ray says something every few minutes.

The child appends to the file by a descriptor of its own, so whoever started it may cut the file under its hands.
"""

import contextlib
import os
from io import BufferedWriter
from pathlib import Path

LOG_BYTES = 1 << 20
"""A log that grows beyond this is cut to its last sixteenth."""


class ChildLog:
    """One file; the process that starts the child calls all methods."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self) -> BufferedWriter:
        """For the child's standard output or error: appending, so that a cut leaves no hole.

        Raises:
            OSError: the file system refused.
        """
        return self.path.open("ab")

    def trim(self) -> None:
        """Cuts the file where it is too long; what is written in this very moment may be lost."""
        with contextlib.suppress(OSError):
            if self.path.stat().st_size > LOG_BYTES:
                with self.path.open("rb") as log:
                    log.seek(-LOG_BYTES // 16, os.SEEK_END)
                    tail = log.read().partition(b"\n")[2]
                os.truncate(self.path, 0)
                with self.open() as log:
                    log.write(tail)

    def lines(self) -> list[str]:
        """What the child has said; nothing where the file cannot be read."""
        with contextlib.suppress(OSError):
            return self.path.read_text(errors="replace").strip().splitlines()
        return []
