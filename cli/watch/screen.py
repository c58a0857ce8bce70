"""The watch on a terminal: a reading thread, and a main loop that draws, listens for q and follows the window's size.

The reading thread may wait for a network as long as it likes; the screen answers meanwhile. Whichever way the loop
ends, the terminal is what it was.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.live import Live

from .table import draw
from .view import Source, View, waiting

REDRAW_SECONDS = 1.0
"""So that "12 s ago" stays true."""
END_SECONDS = 1.0
"""How long a reading under way may keep the command from ending."""


class Reading:
    """The thread that asks the source for views, again and again until `close`."""

    def __init__(self, source: Source, first: View, interval_seconds: float) -> None:
        self.view = first
        self.error: Exception | None = None
        """What ended the reading."""
        self.news, self._tell = os.pipe()
        """Readable when there is something new."""
        self._source = source
        self._interval_seconds = interval_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join(END_SECONDS)

    def _run(self) -> None:
        while self.error is None and not self._ended.is_set():
            try:
                self.view = self._source.read(time.time())
            except Exception as error:  # noqa: BLE001 - the main thread raises it
                self.error = error
            os.write(self._tell, b"\0")
            self._ended.wait(self._interval_seconds)
        self._source.close()


def show(source: Source, where: str, metric: str, interval_seconds: float) -> None:
    """Watches until q or Ctrl-C, or SIGTERM.

    Raises:
        Exception: what the source raised.
    """
    console = Console()
    with _signals() as signalled, _keys() as keys:
        reading = Reading(source, waiting(where, metric, "reading …"), interval_seconds)
        try:
            with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
                while reading.error is None:
                    size = console.size
                    live.update(draw(reading.view, time.time(), size.width, size.height), refresh=True)
                    ready, _, _ = select.select([reading.news, signalled, *keys], [], [], REDRAW_SECONDS)
                    said = {one: os.read(one, 1024) for one in ready}
                    if any(end in said.get(signalled, b"") for end in _ENDING):
                        return
                    if any(said.get(key) == b"" or b"q" in said.get(key, b"").lower() for key in keys):
                        return
        finally:
            reading.close()
        if reading.error is not None:
            raise reading.error


_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP)


@contextlib.contextmanager
def _signals() -> Iterator[int]:
    """A pipe on which the numbers of signals come; Python's own handling of them is put off meanwhile."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watched = (*_ENDING, signal.SIGWINCH)
    before: dict[signal.Signals, Any] = {one: signal.signal(one, lambda *_: None) for one in watched}
    before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # a shell would get its terminal as it is
    earlier = signal.set_wakeup_fd(writer)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(earlier)
        for one, handler in before.items():
            signal.signal(one, handler)


@contextlib.contextmanager
def _keys() -> Iterator[list[int]]:
    """Standard input, whose keys come at once and unseen; nothing where it is no terminal."""
    if not sys.stdin.isatty():
        yield []
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    tty.setcbreak(keyboard)
    try:
        yield [keyboard]
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
