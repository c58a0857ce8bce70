"""Processes of a test and their whole offspring, told by a variable in their environment, which children inherit."""

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

MARKER = "EIGENWATCH_TEST_MARKER"
_T = TypeVar("_T")


def marked_environment() -> tuple[str, dict[str, str]]:
    """A new marker, and an environment that carries it."""
    marker = uuid.uuid4().hex
    return marker, dict(os.environ) | {MARKER: marker}


def marked(marker: str) -> dict[int, str]:
    """Command lines of the living processes that carry the marker, by pid."""
    wanted = f"{MARKER}={marker}".encode()
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def end_all(marker: str) -> None:
    for pid in marked(marker):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], _T], seconds: float = 60.0, what: str = "the condition") -> _T:
    """The first true value of `condition`, asked again and again until the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not come true within {seconds:g} s"
        time.sleep(0.05)
