"""The demo's training as a child process: torchrun, and the lines that its rank 0 prints."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self


class TrainingFailed(Exception):
    """The training ended with an error; the message is its last words."""


class Training:
    """Started by entering the `with`; ended by leaving it, by `stop`, or by itself."""

    def __init__(self, arguments: list[str], ranks: int) -> None:
        self.metrics_url: str | None = None
        self._command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
            "-m", "eigenwatch.cli.demo.train", *arguments,
        ]  # fmt: skip
        self._interrupted = False

    def messages(self) -> Iterator[dict[str, Any]]:
        """What rank 0 says, until the end.

        Raises:
            TrainingFailed: it ended with an error.
            KeyboardInterrupt: Ctrl-C, also one that came while the child was being started.
        """
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._interrupted:
            raise KeyboardInterrupt
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.startswith(b"{"):
                continue
            said: dict[str, Any] = json.loads(line)
            self.metrics_url = said.get("metrics_url", self.metrics_url)
            yield said
        if self._process.wait() != 0:
            raise TrainingFailed(self._last_words())

    def stop(self, timeout_seconds: float) -> None:
        """Asks it to end after the step under way and waits; then insists."""
        for number, patience in (
            (signal.SIGINT, timeout_seconds),
            (signal.SIGTERM, 10.0),
            (signal.SIGKILL, 10.0),
        ):
            if self._process.poll() is not None:
                return
            self._process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.communicate(timeout=patience)

    def __enter__(self) -> Self:
        # Ctrl-C between the start of the child and our hold on it would leave it behind: it is kept for `messages`.
        signal.signal(signal.SIGINT, self._remember_interrupt)
        self._log = tempfile.NamedTemporaryFile(prefix="eigenwatch-demo-", suffix=".log", delete=False)
        self._process = subprocess.Popen(
            self._command,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C reaches us alone, and we end it once
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(10.0)
        self._log.close()
        if self._process.returncode in (0, -signal.SIGINT) or kind is None:
            Path(self._log.name).unlink(missing_ok=True)

    def _remember_interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        self._interrupted = True

    def _last_words(self) -> str:
        lines = Path(self._log.name).read_text(errors="replace").splitlines()
        errors = [line for line in lines if "Error: " in line and "ChildFailedError" not in line]
        words = errors[0].split("Error: ", 1)[1] if errors else "the training ended without a word"
        return f"{words} (its log: {self._log.name})"
