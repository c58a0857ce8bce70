"""The embedded aggregator: rank 0 starts `eigenwatch serve` with a Ray of its own, for the life of the job.

It is a child process, so that neither its memory nor its faults are the rank's. Its standard input is a lifeline:
when the rank closes it, or dies, the aggregator finishes what it holds, writes it, and ends with its Ray.

Where it dies in the middle (its Ray's death is its own), rank 0's outbox thread starts another on the same store. Its
Ray has another address then, so couriers are given a file that says it, and read that again after each failure.
"""

import contextlib
import json
import logging
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path
from typing import NamedTuple

from .child_log import ChildLog

log = logging.getLogger("eigenwatch.agent")

START_SECONDS = 120.0
RESTART_SECONDS = (0.0, 5.0, 15.0, 60.0)
"""Waits before it is started again, by the number of starts since it was last ready."""


class Served(NamedTuple):
    """Where an aggregator is reached."""

    address: str
    """Of the Ray cluster, or the path of the file that says it."""
    metrics_url: str | None = None
    store: str | None = None
    """Of an embedded aggregator."""


class EmbeddedAggregator:
    """The child process. `start` on construction; `close` ends it, on the training's thread; the outbox's thread
    calls `supervise`."""

    def __init__(self, store: str, metrics_port: int) -> None:
        """Raises ValueError, in the aggregator's own words, where it cannot start."""
        self._store, self._metrics_port = store, metrics_port
        self._folder = Path(tempfile.mkdtemp(prefix="eigenwatch-serve-"))
        self._log = ChildLog(self._folder / "serve.log")
        self._changing = threading.Lock()
        self._closing = False
        self._starts = 0
        self._next_start: float | None = None
        """On the monotonic clock, once the process has died."""
        self._process = self._start(metrics_port)
        self._started_at = time.monotonic()
        if not self._became_ready(START_SECONDS):
            raise ValueError(self._why_not())
        self.served = Served(str(self._folder / "address"), self._metrics_url, store)

    def supervise(self) -> None:
        """Starts another where the process has died; returns at once."""
        with self._changing:
            if self._closing:
                return
            now = time.monotonic()
            if self._process.poll() is None:
                if not self._ready and not self._became_ready(0.0) and now - self._started_at > START_SECONDS:
                    self._process.kill()
                return
            if self._next_start is None:
                wait = RESTART_SECONDS[min(self._starts, len(RESTART_SECONDS) - 1)]
                log.warning("the embedded aggregator ended, see %s; starting another in %.0f s", self._log.path, wait)
                self._next_start = now + wait
            if now < self._next_start:
                return
            self._log.trim()
            # Prometheus knows the old port; where somebody has taken it meanwhile, the next try has the user's choice.
            known = urllib.parse.urlsplit(self._metrics_url).port
            port = known if known and self._starts % 2 == 0 else self._metrics_port
            self._close_pipes()
            with contextlib.suppress(OSError):  # then the dead one is found again
                self._process = self._start(port)
            self._starts += 1
            self._started_at, self._next_start = now, None

    def close(self, timeout_seconds: float) -> None:
        """Lets it write what it holds and waits for its end."""
        with self._changing:
            self._closing = True
        assert self._process.stdin is not None
        if not self._ready:  # it died and another is starting, which holds nothing
            self._process.kill()
        with contextlib.suppress(OSError, ValueError):  # a dead one's pipe may be closed, and no other have come
            self._process.stdin.write(b"end\n")  # forked DataLoader workers may keep the pipe open
            self._process.stdin.close()
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10.0)
            self._process.kill()
        if self._process.returncode == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, metrics_port: int) -> "subprocess.Popen[bytes]":
        self._ready = False
        with self._log.open() as errors:
            return subprocess.Popen(
                [
                    sys.executable, "-m", "eigenwatch.cli", "serve", "--json", "--follow-stdin", "--device", "cpu",
                    "--store", self._store, "--metrics-port", str(metrics_port),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # Ctrl-C ends the training; the aggregator then ends by its lifeline
            )  # fmt: skip

    def _became_ready(self, timeout_seconds: float) -> bool:
        """Whether it says within the time that it serves; then its address is where couriers look for it."""
        assert self._process.stdout is not None
        if select.select([self._process.stdout], [], [], timeout_seconds)[0]:
            with contextlib.suppress(ValueError, KeyError, OSError):
                ready = json.loads(self._process.stdout.readline())
                new = self._folder / "address.new"
                new.write_text(ready["address"])
                new.rename(self._folder / "address")
                self._metrics_url: str = ready["metrics_url"]
                self._ready, self._starts = True, 0
        return self._ready

    def _why_not(self) -> str:
        dead = self._process.poll() is not None
        self._process.kill()
        self._process.wait()
        errors = [line.removeprefix("Error: ") for line in self._log.lines() if line.startswith("Error: ")]
        if errors:
            shutil.rmtree(self._folder, ignore_errors=True)
            return errors[-1]
        what = "did not start" if dead else f"was not ready after {START_SECONDS:.0f} s"
        return f"the embedded aggregator {what}: see {self._log.path}, or run `eigenwatch doctor`"

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
