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

from tests.processes import NEVER_BEHIND, PATIENCE_SECONDS, end_all, marked, marked_environment, wait_until

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
SHARDS = 2
DEADLINE_SECONDS = 3.0
"""How long a record waits for its last rank: a fault that stops a process lasts longer."""

AWAY_SECONDS = 2.0
"""Where `serve` has a Ray of its own, a shard that is stopped has its layers moved, and back when it goes on."""


class Aggregator:
    """`eigenwatch serve` with a Ray of its own, and what the other forms share with it."""

    form = "own"

    def __init__(self, folder: Path, store: Path) -> None:
        self.store = store
        self.marker, environment = marked_environment()
        self.environment = environment | {"OMP_NUM_THREADS": "1"}
        self.metrics_url: str | None = None
        self.address = ""
        self.is_up = False
        """Whether it was started and not killed since."""
        self._folder = folder
        self._serve: subprocess.Popen[bytes] | None = None
        self._changing = threading.Lock()

    def job_options(self) -> list[str]:
        """What the job's command line says about it."""
        return ["--aggregator", self.address]

    def start(self) -> None:
        with self._changing:
            wait_until(self._serves, "an aggregator that serves")

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
        self.is_up = False
        end_all(self.marker)
        if self._serve is not None:
            self._serve.wait(30)

    def discard(self) -> None:
        """Ends whatever is left of it."""
        end_all(self.marker)

    def supervise(self) -> None:
        """Tries to start `serve` again where it has died."""
        with self._changing:
            if self.is_up and self._serve is not None and self._serve.poll() is not None:
                self._serves()

    def _serves(self) -> bool:
        """Starts `serve`; False where it ends at once."""
        command = [
            sys.executable, "-m", "eigenwatch.cli", "serve", "--json", "--store", str(self.store),
            "--metrics-port", "0", "--shards", str(SHARDS), "--deadline", str(DEADLINE_SECONDS), "--device", "cpu",
        ]  # fmt: skip
        with (self._folder / "serve.log").open("ab") as log:
            self._serve = subprocess.Popen(
                [*command, *NEVER_BEHIND, *self._options()], stdout=subprocess.PIPE, stderr=log, env=self.environment
            )
        assert self._serve.stdout is not None
        if not select.select([self._serve.stdout], [], [], PATIENCE_SECONDS)[0]:
            self._serve.kill()
        try:
            said = json.loads(self._serve.stdout.readline())
        except ValueError:  # what the last one left on the cluster is still ending, or the disk is full
            self._serve.wait(30)
            return False
        self.address, self.metrics_url, self.is_up = said["address"], said["metrics_url"], True
        return True

    def _options(self) -> list[str]:
        """More of them, for `serve`."""
        return ["--away", str(AWAY_SECONDS)]


class OnCluster(Aggregator):
    """`eigenwatch serve` on a cluster that stands at one address."""

    form = "cluster"

    def __init__(self, folder: Path, store: Path) -> None:
        super().__init__(folder, store)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        # pytest's own folders are too long for the names of Ray's sockets.
        self._ray_folder = tempfile.mkdtemp(prefix="ew-ray-")

    def start(self) -> None:
        head = [*RAY, "start", "--head", "--node-ip-address", "127.0.0.1", "--port", str(self._port)]
        small = ["--num-cpus", str(SHARDS), "--include-dashboard", "false", "--object-store-memory", str(256 << 20)]
        with self._changing:

            def started() -> bool:
                command = [*head, *small, "--temp-dir", self._ray_folder]
                return subprocess.run(command, env=self.environment, capture_output=True, timeout=120).returncode == 0

            wait_until(started, "a Ray head")  # the port of the one before may be held for a moment
            wait_until(self._serves, "an aggregator that serves")

    def _options(self) -> list[str]:
        return ["--address", f"127.0.0.1:{self._port}"]

    def discard(self) -> None:
        """Its logs stay."""
        super().discard()
        for logs in Path(self._ray_folder).glob("session_2*/logs"):
            shutil.copytree(logs, self._folder / "ray" / logs.parent.name, dirs_exist_ok=True)
        shutil.rmtree(self._ray_folder, ignore_errors=True)


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
