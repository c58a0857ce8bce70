"""The training job of the chaos tests from outside: starting it, starting it again where it dies, and its notes."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.job import Line
from tests.jobs.launch import REPOSITORY
from tests.processes import PATIENCE_SECONDS

RANKS = 2


class Training:
    """`tests.chaos.job` under torchrun. `supervise` is the scheduler that gives it another try."""

    def __init__(
        self, out: Path, environment: dict[str, str], *, run_id: str, tokens: int, prefix: Sequence[str] = ()
    ) -> None:
        """`prefix` is the beginning of its command line, such as the one that enters another host."""
        out.mkdir(parents=True)
        self.out, self.run_id = out, run_id
        self._environment, self._tokens, self._prefix = environment, tokens, prefix
        self._options: tuple[str, ...] = ()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        """Options of the job."""
        self._options = options
        self._process = self._start(self.out, *options)

    def supervise(self) -> None:
        """Starts it again where a rank's death has ended it."""
        assert self._process is not None
        if self._process.poll() not in (None, 0):
            # Not by torchrun: its second try of gloo meets the addresses of the first (seen with torch 2.13).
            self._process = self._start(self.out, *self._options)

    def finish(self) -> int:
        """Lets it close, in order; its exit code."""
        assert self._process is not None
        (self.out / "go").touch()
        return self._process.wait(PATIENCE_SECONDS)

    def lines(self) -> list[list[Line]]:
        """What each rank has said so far, over all launches."""
        return [Line.read(self.out, rank) for rank in range(RANKS)]

    def steps_done(self) -> int:
        """By rank 0, over all launches."""
        return len(Line.read(self.out, 0))

    def step(self) -> int:
        """The last step that rank 0 has ended."""
        lines = Line.read(self.out, 0)
        return lines[-1].step if lines else -1

    def losses_alone(self, steps: int) -> list[dict[int, str]]:
        """The losses of the same job without eigenwatch and without faults, by step, of each rank."""
        alone = self.out / "alone"
        alone.mkdir()
        self._start(alone, "--aggregator", "none", "--steps", str(steps)).wait(PATIENCE_SECONDS)
        return [{one.step: one.loss for one in Line.read(alone, rank)} for rank in range(RANKS)]

    def _start(self, out: Path, *options: str) -> "subprocess.Popen[bytes]":
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        job = ["-m", "tests.chaos.job", str(out), "--run-id", self.run_id, "--tokens", str(self._tokens)]
        with (out / "job.log").open("ab") as log:
            return subprocess.Popen(
                [*self._prefix, sys.executable, *torchrun, "--monitor-interval", "0.2", *job, *options],
                env=self._environment | {"GLOO_SOCKET_IFNAME": "lo"},
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
