"""The forms in which an aggregator runs beside the chaos job, and the supervisor that starts it again.

cluster: `ray start --head` at a port that stays, with `eigenwatch serve --address` on it. own: `eigenwatch serve` with
a Ray of its own. embedded: the job's rank 0 starts it.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from tests.processes import PATIENCE_SECONDS, end_all, marked, marked_environment, wait_until

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
SHARDS = 2
DEADLINE_SECONDS = 3.0
"""How long a record waits for its last rank: a fault that stops a process lasts longer."""


class Aggregator:
    """`eigenwatch serve` with a Ray of its own, and what the other forms share with it."""

    form = "own"

    def __init__(self, folder: Path, store: Path) -> None:
        self.store = store
        self.marker, environment = marked_environment()
        self.environment = environment | {"OMP_NUM_THREADS": "1"}
        self.metrics_url: str | None = None
        self.address = ""
        self._folder = folder
        self._serve: subprocess.Popen[bytes] | None = None
        self._changing = threading.Lock()

    def job_options(self) -> list[str]:
        """What the job's command line says about it."""
        return ["--aggregator", self.address]

    def start(self) -> None:
        with self._changing:
            self._start_serve()

    def processes(self) -> dict[int, str]:
        """Command lines by pid."""
        return marked(self.marker)

    def close(self) -> int:
        """Ends it in order; what `serve` exits with."""
        with self._changing:
            assert self._serve is not None
            self._serve.terminate()
            return self._serve.wait(PATIENCE_SECONDS)

    def kill(self) -> None:
        """Every process at once: `serve`, its actors, and Ray with its head."""
        end_all(self.marker)
        if self._serve is not None:
            self._serve.wait(30)

    def supervise(self) -> None:
        """Starts `serve` again where it has died."""
        with self._changing:
            if self._serve is not None and self._serve.poll() is not None:
                self._start_serve()

    def _start_serve(self, *options: str) -> None:
        command = [
            sys.executable, "-m", "eigenwatch.cli", "serve", "--json", "--store", str(self.store),
            "--metrics-port", "0", "--shards", str(SHARDS), "--deadline", str(DEADLINE_SECONDS), "--device", "cpu",
        ]  # fmt: skip

        def ready() -> dict[str, Any] | None:
            with (self._folder / "serve.log").open("ab") as log:
                self._serve = subprocess.Popen(
                    [*command, *options], stdout=subprocess.PIPE, stderr=log, env=self.environment
                )
            assert self._serve.stdout is not None
            if not select.select([self._serve.stdout], [], [], PATIENCE_SECONDS)[0]:
                self._serve.kill()
            with contextlib.suppress(ValueError):
                return dict(json.loads(self._serve.stdout.readline()))
            self._serve.wait(30)
            return None  # what the last one left on the cluster is still ending, or the disk is full

        said = wait_until(ready, "an aggregator that serves")
        self.address, self.metrics_url = said["address"], said["metrics_url"]


class OnCluster(Aggregator):
    """`eigenwatch serve` on a cluster that stands at one address."""

    form = "cluster"

    def __init__(self, folder: Path, store: Path) -> None:
        super().__init__(folder, store)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._ray_folder = tempfile.mkdtemp(
            prefix="ew-ray-"
        )  # pytest's own are too long for the names of Ray's sockets

    def start(self) -> None:
        head = [*RAY, "start", "--head", "--node-ip-address", "127.0.0.1", "--port", str(self._port)]
        small = ["--num-cpus", str(SHARDS), "--include-dashboard", "false", "--object-store-memory", str(256 << 20)]
        with self._changing:

            def started() -> bool:
                command = [*head, *small, "--temp-dir", self._ray_folder]
                return subprocess.run(command, env=self.environment, capture_output=True, timeout=120).returncode == 0

            wait_until(started, "a Ray head")  # the port of the one before may be held for a moment
            self._start_serve("--address", f"127.0.0.1:{self._port}")

    def supervise(self) -> None:
        with self._changing:
            if self._serve is not None and self._serve.poll() is not None and self._head_lives():
                self._start_serve("--address", f"127.0.0.1:{self._port}")

    def close(self) -> int:
        code = super().close()
        end_all(self.marker)
        shutil.rmtree(self._ray_folder, ignore_errors=True)
        return code

    def _head_lives(self) -> bool:
        return any("gcs_server" in command for command in self.processes().values())


class Embedded(Aggregator):
    """The job's own: it starts it, and starts it again."""

    form = "embedded"

    def __init__(self, folder: Path, store: Path, job_marker: str) -> None:
        super().__init__(folder, store)
        self.marker = job_marker
        self.url_file = folder / "metrics_url"

    def job_options(self) -> list[str]:
        return ["--aggregator", "embedded", "--store", str(self.store)]

    def start(self) -> None:
        """The job does."""

    def supervise(self) -> None:
        with contextlib.suppress(OSError):
            self.metrics_url = self.url_file.read_text()

    def close(self) -> int:
        return 0

    def kill(self) -> None:
        """`serve` alone, whose Ray ends with it."""
        for pid, command in self.processes().items():
            if "eigenwatch.cli serve" in command:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
