"""Training on one host, the aggregator on another, and a network between them that fails and comes back.

The trainer's host needs a Ray node of its own, without CPUs for anybody's actors, since a courier is a Ray driver: a
sidecar, `ray start --address=… --num-cpus=0 --block`. Where the network fails for longer than Ray's health check, the
head gives that node up for dead; when it hears of this, its raylet exits, and whoever supervises the sidecar must start
it again. The test does.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from eigenwatch.history import open_history

from tests.chaos.aggregators import RAY
from tests.chaos.hosts import TwoHosts
from tests.chaos.job import EVERY
from tests.chaos.training import Training
from tests.chaos.verdict import judge, longest_stall
from tests.processes import NEVER_BEHIND, PATIENCE_SECONDS, end_all, marked, marked_environment, wait_until

PORT = 6399
NODE_DEATH_SECONDS = 10.0
"""After so long without an answer the head has given a node up: see HEALTH."""
HEALTH = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
}
"""Ray's own figures are 3 s, 10 s and 5 times."""
SMALL = ["--object-store-memory", str(128 << 20)]


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    try:
        hosts = TwoHosts()
    except (OSError, subprocess.CalledProcessError, AssertionError) as error:
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', b'') or error}")
    with hosts:
        yield hosts


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Of everything on both hosts."""
    marker, environment = marked_environment()
    spools = tempfile.mkdtemp(prefix="ew-chaos-", dir="/dev/shm")
    yield environment | HEALTH | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token", "EIGENWATCH_SPOOL": spools}
    end_all(marker)
    shutil.rmtree(spools, ignore_errors=True)


class Sidecar:
    """The Ray node of the trainer's host."""

    def __init__(self, hosts: TwoHosts, environment: dict[str, str], log: Path) -> None:
        node = ["start", "--address", f"{hosts.aggregator.address}:{PORT}", "--node-ip-address", hosts.trainer.address]
        self._command = [*hosts.trainer.prefix, *RAY, *node, "--num-cpus", "0", "--block", *SMALL]
        self._environment, self._log = environment, log
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log)

    def is_dead(self) -> bool:
        return self._process.poll() is not None


def newest_stored(store: Path) -> int:
    """The newest sampled step of which a complete record is stored; -1 before the first."""
    with contextlib.suppress(ValueError), open_history(store) as history:
        (row,) = history.query("SELECT max(step) AS step FROM records WHERE complete").to_pylist()
        return -1 if row["step"] is None else int(row["step"])
    return -1


@pytest.mark.timeout(900)
def test_records_of_the_time_of_a_partition_arrive_when_it_heals(hosts, environment, tmp_path):
    start_head(hosts, environment)
    store = tmp_path / "store"
    serve = start_serve(hosts, environment, store)
    sidecar = Sidecar(hosts, environment, tmp_path / "sidecar.log")
    training = Training(tmp_path / "job", environment, run_id="two", tokens=56, prefix=hosts.trainer.prefix)
    training.start("--step-seconds", "0.2", "--aggregator", f"{hosts.aggregator.address}:{PORT}")
    wait_until(lambda: newest_stored(store) >= 0, "the first record")

    # Shorter than the health check: nobody dies.
    cut_for(hosts, NODE_DEATH_SECONDS / 5, training)
    caught_up(store, training)
    assert not sidecar.is_dead()

    # Longer: the head gives the trainer's node up, which hears of it when the network is back.
    stored = newest_stored(store)
    cut_for(hosts, 2 * NODE_DEATH_SECONDS, training)
    assert newest_stored(store) < training.step() - 2 * EVERY, "the link was not cut"
    assert newest_stored(store) >= stored
    wait_until(sidecar.is_dead, "the end of a raylet that was given up for dead")
    sidecar.start()
    caught_up(store, training)

    codes = {"job": training.finish()}
    end(environment, serve)
    codes["serve"] = serve.wait(PATIENCE_SECONDS)
    assert judge(training, store, codes, counted=None) == []
    for lines in training.lines():
        assert longest_stall(lines) < NODE_DEATH_SECONDS, "the training waited for the network"


def start_head(hosts: TwoHosts, environment: dict[str, str]) -> None:
    head = ["start", "--head", "--node-ip-address", hosts.aggregator.address, "--port", str(PORT)]
    options = ["--num-cpus", "2", "--include-dashboard", "false", *SMALL]
    subprocess.run(
        [*hosts.aggregator.prefix, *RAY, *head, *options], env=environment, check=True, capture_output=True, timeout=120
    )


def start_serve(hosts: TwoHosts, environment: dict[str, str], store: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "eigenwatch.cli", "serve", "--json", "--store", str(store), "--device", "cpu"]
    where = ["--address", f"{hosts.aggregator.address}:{PORT}", "--metrics-port", "0", "--deadline", "3"]
    with (store.parent / "serve.log").open("ab") as log:
        serve = subprocess.Popen(
            [*hosts.aggregator.prefix, *command, *where, *NEVER_BEHIND],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    assert serve.stdout is not None
    assert serve.stdout.readline(), (store.parent / "serve.log").read_text()
    return serve


def cut_for(hosts: TwoHosts, seconds: float, training: Training) -> None:
    """Cuts the link for so long, while which the training goes on."""
    before, until = training.step(), time.monotonic() + seconds
    hosts.cut()
    wait_until(lambda: time.monotonic() >= until)
    assert training.step() > before
    hosts.heal()


def caught_up(store: Path, training: Training) -> None:
    here = training.step()
    wait_until(lambda: newest_stored(store) >= here - EVERY, f"the records up to step {here}")


def end(environment: dict[str, str], serve: "subprocess.Popen[bytes]") -> None:
    """`serve` itself, not the command that entered its host."""
    for pid, command in marked(environment["EIGENWATCH_TEST_MARKER"]).items():
        if "eigenwatch.cli serve" in command and pid != serve.pid:
            os.kill(pid, signal.SIGTERM)
