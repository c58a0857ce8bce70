"""The embedded aggregator: rank 0 starts `eigenwatch serve` with a Ray of its own, for the life of the job.

It is a child process, so that neither its memory nor its faults are the rank's. Its standard input is a lifeline:
when the rank closes it, or dies, the aggregator finishes what it holds, writes it, and ends with its Ray.
"""

import contextlib
import json
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

START_SECONDS = 120.0


class Served(NamedTuple):
    """Where an aggregator is reached."""

    address: str
    """Of the Ray cluster."""
    metrics_url: str | None = None


class EmbeddedAggregator:
    """The child process. `start` on construction; `close` ends it."""

    def __init__(self, store: str, metrics_port: int) -> None:
        """Raises ValueError, in the aggregator's own words, where it cannot start."""
        self._log = tempfile.NamedTemporaryFile(prefix="eigenwatch-serve-", suffix=".log", delete=False)  # noqa: SIM115
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "eigenwatch.cli", "serve", "--json", "--follow-stdin", "--device", "cpu",
                "--store", store, "--metrics-port", str(metrics_port),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C ends the training; the aggregator then ends by its lifeline
        )  # fmt: skip
        self.served = self._wait_until_ready()

    def close(self, timeout_seconds: float) -> None:
        """Lets it write what it holds and waits for its end."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(b"end\n")  # forked DataLoader workers may keep the pipe open
            self._process.stdin.close()
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10.0)
            self._process.kill()
        self._log.close()
        if self._process.returncode == 0:
            Path(self._log.name).unlink(missing_ok=True)

    def _wait_until_ready(self) -> Served:
        assert self._process.stdout is not None
        deadline = time.monotonic() + START_SECONDS
        readable, _, _ = select.select([self._process.stdout], [], [], deadline - time.monotonic())
        line = self._process.stdout.readline() if readable else b""
        with contextlib.suppress(ValueError, KeyError):
            ready = json.loads(line)
            return Served(ready["address"], ready["metrics_url"])
        self._process.kill()
        self._process.wait()
        words = Path(self._log.name).read_text(errors="replace").strip().splitlines()
        errors = [word.removeprefix("Error: ") for word in words if word.startswith("Error: ")]
        if errors:
            Path(self._log.name).unlink()
            raise ValueError(errors[-1])
        what = "did not start" if readable else f"was not ready after {START_SECONDS:.0f} s"
        raise ValueError(f"the embedded aggregator {what}: see {self._log.name}, or run `eigenwatch doctor`")
