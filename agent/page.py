"""A page: a small file in which one process says something to another, over and over.

It is written in place, at a length that never changes, so that saying something needs no room on a disk that is full.
A checksum tells a page that was read while it was written; the reader then takes it for unsaid, and looks again.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

PAGE_BYTES = 4096


class Page:
    """One file, with one writer."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, said: dict[str, Any]) -> None:
        """Says it in place of what was said before; what is too long, or cannot be written, stays unsaid."""
        text = json.dumps(said).encode()
        line = b"%08x %s" % (zlib.crc32(text), text)
        if len(line) > PAGE_BYTES:
            return
        with contextlib.suppress(OSError):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(descriptor, line.ljust(PAGE_BYTES), 0)
            finally:
                os.close(descriptor)

    def read(self) -> dict[str, Any]:
        """What was said last; empty where nothing was, or it cannot be read now."""
        with contextlib.suppress(OSError, ValueError):
            checksum, _, text = self._path.read_bytes().rstrip().partition(b" ")
            if int(checksum, 16) == zlib.crc32(text):
                said = json.loads(text)
                return said if isinstance(said, dict) else {}
        return {}
