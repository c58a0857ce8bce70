"""A storm: one training job, one aggregator, and the faults that a seed draws, until all is quiet again.

    with Storm(folder, form="cluster", schedule=draw(3, "cluster", 8), tokens=56) as storm:
        storm.run()
        problems = storm.judged()

The storm plays the supervisor of `serve`, of Ray's head and of the job.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from eigenwatch.agent.spool import spools_in
from eigenwatch.schemas import PartialRefused
from eigenwatch.schemas.ray_token import token_environment

from tests.chaos.aggregators import Aggregator, Embedded, OnCluster
from tests.chaos.disk import Disk
from tests.chaos.faults import ECHO, FILL, KILL, LOSE_HEAD, PROCESSES, SPOIL, STOP, Fault
from tests.chaos.losses import CountedLosses
from tests.chaos.training import Training
from tests.chaos.verdict import judge
from tests.jobs.launch import REPOSITORY
from tests.processes import PATIENCE_SECONDS, end_all, marked, marked_environment, wait_until

FORMS = ("cluster", "own", "embedded")
STEP_SECONDS = 0.15
QUIET_STEPS = 20
"""So that what was counted last is seen before the run ends, with which its counters go."""

LAUNCHED_STEPS = 4
"""More than the ranks of a launch can do that lost one of them: when they are done the newest launch trains."""


class Storm:
    """Started on construction of its context; everything that it started has ended after it."""

    def __init__(
        self,
        folder: Path,
        *,
        form: str,
        schedule: Sequence[Fault],
        tokens: int,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        """`form` is that of the aggregator, `tokens` those of rank 0 in a step."""
        self.schedule = schedule
        self._say = say
        self.marker, environment = marked_environment()
        self.spools = Path(tempfile.mkdtemp(prefix="ew-chaos-", dir="/dev/shm"))
        self.environment = environment | {"OMP_NUM_THREADS": "1", "EIGENWATCH_SPOOL": str(self.spools)}
        self._began = time.monotonic()
        self.training = Training(folder / "job", self.environment, run_id="storm", tokens=tokens)
        self.disk = Disk(folder / "disk")
        self.store = self.disk.folder / "store"
        self.aggregator: Aggregator
        if form == "embedded":
            self.aggregator = Embedded(self.training.out, self.store, self.marker)
        else:
            self.aggregator = {"cluster": OnCluster, "own": Aggregator}[form](folder, self.store)
        self.losses = CountedLosses(self.training.run_id)
        self.exit_codes: dict[str, int] = {}
        self.spoilt: set[tuple[int, int]] = set()
        """Step and layer of partials that the storm has taken away."""
        self._undo: list[tuple[float, str, Callable[[], None]]] = []
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
        self._broken: list[BaseException] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        end_all(self.marker)
        self.aggregator.discard()
        if self._watch.is_alive():
            self._watch.join(PATIENCE_SECONDS)
        end_all(self.marker)  # what the supervisor has started meanwhile
        self.aggregator.discard()
        self.disk.unmount()
        shutil.rmtree(self.spools, ignore_errors=True)

    def run(self) -> None:
        """Training, faults, quiet, and the end of job and aggregator, in order."""
        self.aggregator.start()
        self.training.start("--step-seconds", str(STEP_SECONDS), *self.aggregator.job_options())
        self._watch.start()
        self._wait(lambda: any(self.store.glob("*/records/*.parquet")), "the first record")
        for number, fault in enumerate(self.schedule):
            self._train_on(fault.after_steps)
            self._tell(f"{number}. {fault}{self._happen(fault)}")
        while self._undo or self.processes("tests.chaos.echo"):
            self._train_on(1)
        self._train_on(LAUNCHED_STEPS)
        self._wait(self._no_dead_spools, "the delivery of what dead launches left")
        self._train_on(QUIET_STEPS)
        self._tell("quiet")
        self.exit_codes["job"] = self.training.finish()
        self._wait(lambda: not self._couriers(), "the end of every courier")
        self._over.set()
        self._watch.join(PATIENCE_SECONDS)
        if self.aggregator.metrics_url is not None:
            self.losses.read(self.aggregator.metrics_url)
        self.exit_codes["aggregator"] = self.aggregator.close()

    def judged(self) -> list[str]:
        """The promises that were broken."""
        return judge(self.training, self.store, self.exit_codes, self.losses.by_reason, self.spoilt)

    # What happens

    def _happen(self, fault: Fault) -> str:
        """Lets it happen; what is to be said beside."""
        if fault.action in (KILL, STOP):
            return self._signal(fault)
        if fault.action == ECHO:
            with (self.training.out / "echo.log").open("ab") as log:
                command = [sys.executable, "-m", "tests.chaos.echo", str(fault.hold_seconds + 2.0), str(fault.choice)]
                subprocess.Popen(command, env=self._driver_environment(), cwd=REPOSITORY, stdout=log, stderr=log)
        elif fault.action == FILL:
            if not self.disk.mounted:
                return ": skipped, no tmpfs can be mounted here"
            self.disk.fill()
            self._later(fault, self.disk.free)
        elif fault.action == SPOIL:
            return self._spoil(fault.choice)
        elif fault.action == LOSE_HEAD:
            if not self.aggregator.is_up:
                return ": skipped, it is gone already"
            self.aggregator.kill()
            self._later(fault, lambda: threading.Thread(target=self._guarded, args=(self.aggregator.start,)).start())
        return ""

    def _driver_environment(self) -> dict[str, str]:
        """Of a process that joins the cluster, as a courier does."""
        return self.environment | token_environment(self.environment)

    def _signal(self, fault: Fault) -> str:
        found = sorted(self.processes(PROCESSES[fault.process]))
        if not found:
            return ": skipped, no such process"
        pid = found[fault.choice % len(found)]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL if fault.action == KILL else signal.SIGSTOP)
        if fault.action == STOP:
            self._later(fault, lambda: _continue(pid))
        return f" (pid {pid})"

    def _spoil(self, choice: int) -> str:
        waiting = [(spool, number) for spool in spools_in([self.spools]) for number in spool.numbers()]
        for spool, number in waiting[choice % max(len(waiting), 1) :]:
            with contextlib.suppress(FileNotFoundError, PartialRefused):
                header = spool.read(number).header
                garbage = spool.folder / "garbage"
                garbage.write_bytes(b"not an Arrow file")
                garbage.rename(spool.folder / f"{number:012d}.arrow")
                self.spoilt.add((header["step"], header["layer"]))
                return f": step {header['step']} layer {header['layer']} of rank {header['rank']}"
        return ": skipped, nothing waits"

    def processes(self, words: str) -> dict[int, str]:
        """Of job and aggregator, those whose command line holds these words."""
        both = marked(self.marker) | self.aggregator.processes()
        return {pid: line for pid, line in both.items() if words in line and "torch.distributed.run" not in line}

    # Waiting

    def _train_on(self, steps: int) -> None:
        """Returns when so many more steps are done; what is to be undone meanwhile is."""
        done = self.training.steps_done()
        self._wait(lambda: self.training.steps_done() >= done + steps, f"{steps} more steps of training")

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        def met() -> bool:
            for error in self._broken:
                raise error
            for due in [one for one in self._undo if one[0] <= time.monotonic()]:
                self._undo.remove(due)
                due[2]()
                self._tell(f"over: {due[1]}")
            return condition()

        wait_until(met, what)

    def _later(self, fault: Fault, undo: Callable[[], None]) -> None:
        self._undo.append((time.monotonic() + fault.hold_seconds, f"{fault.action} {fault.process}".strip(), undo))

    def _no_dead_spools(self) -> bool:
        """Whether only the living launch has spools."""
        launches = {one.launch_id for one in self.training.lines()[0][-1:]}
        return all(any(launch in folder.name for launch in launches) for folder in self.spools.iterdir())

    def _couriers(self) -> dict[int, str]:
        return self.processes(PROCESSES["courier"])

    # The supervisor's thread

    def _supervise(self) -> None:
        while not self._over.wait(0.5):
            self._guarded(self.aggregator.supervise)
            self._guarded(self.training.supervise)
            if self.aggregator.metrics_url is not None:
                self.losses.read(self.aggregator.metrics_url)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - raised where the storm waits
            self._broken.append(error)

    def _tell(self, line: str) -> None:
        self._say(f"{time.monotonic() - self._began:6.1f} s, step {self.training.step()}: {line}")


def _continue(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
