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
PATIENCE_SECONDS = 180.0
"""How long a test waits for what must come: so long that a busy machine alone does not fail it."""
NEVER_BEHIND = ("--behind", "3600")
"""For `serve` where a test expects every sample at its step: no back-pressure."""
_T = TypeVar("_T")


def marked_environment() -> tuple[str, dict[str, str]]:
    """A new marker, and an environment that carries it.

    A Ray that is started in it does not make its workers nicer than everybody else, as it would by 15: beside other
    tests, shards and solvers would have a few percent of a core.
    """
    marker = uuid.uuid4().hex
    return marker, dict(os.environ) | {MARKER: marker, "RAY_worker_niceness": "0"}


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


def wait_for_the_end_of_all(marker: str, but_for: str | None = None) -> None:
    """Waits until no process that carries the marker lives, whose command line does not hold `but_for`."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while left := {
        pid: command for pid, command in marked(marker).items() if but_for is None or but_for not in command
    }:
        assert time.monotonic() < deadline, f"these live on after {PATIENCE_SECONDS:g} s: {left}"
        time.sleep(0.2)


def wait_until(condition: Callable[[], _T], what: str = "the condition") -> _T:
    """The first true value of `condition`, asked again and again, but not so often that asking takes the processor from
    what is waited for."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        asked = time.monotonic()
        value = condition()
        if value:
            return value
        now = time.monotonic()
        assert now < deadline, f"{what} did not come true within {PATIENCE_SECONDS:g} s"
        time.sleep(max(0.05, 4 * (now - asked)))
