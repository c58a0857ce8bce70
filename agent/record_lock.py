"""A POSIX record lock on a file: who holds it lives.

A forked DataLoader worker does not inherit it, so one that outlives its rank does not keep it. It goes when its process
closes any descriptor of the file, so a process opens such a file once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path


class RecordLock:
    """A file's lock, shared or alone, until `release` or the end of the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def take(self, alone: bool) -> bool:
        """Takes it, or changes the way in which it is held; False where others do not allow it.

        Raises:
            OSError: the file cannot be opened.
        """
        fresh = self._descriptor is None
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(self._descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(self._descriptor), self._path.stat()):
                return True  # and not a file that was removed between opening and locking
        except OSError:
            if not fresh:  # as it was held before, it is still
                return False
        self.release()
        return False

    def only_ours(self) -> bool:
        """Whether nobody else holds the lock that this process shares."""
        only = self.take(alone=True)
        if only:
            self.take(alone=False)
        return only

    @property
    def held_elsewhere(self) -> bool:
        """Whether another process holds it alone; for one that does not hold it itself."""
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(descriptor)
        return False

    def moved_to(self, path: Path) -> None:
        """Its file has another name now."""
        self._path = path

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def remove(self) -> None:
        """Removes the file and releases: for one who holds it alone."""
        with contextlib.suppress(OSError):
            self._path.unlink()
        self.release()
