"""Outages, by doing: a job of two ranks trains through them, and then the store has every sampled step once."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from eigenwatch.history import open_history

from tests.conftest import Served, start_serve
from tests.jobs.launch import start_job, step_of
from tests.processes import PATIENCE_SECONDS, end_all, marked, marked_environment, wait_for_the_end_of_all, wait_until

LAYERS = 3
THIS = os.getpid()
"""Part of each run's name: what an earlier test session left under the same name would be delivered too."""
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def records(store: Path, run_id: str, view: str = "records") -> list[tuple[int, int, int, bool]]:
    with contextlib.suppress(Exception), open_history(store) as history:  # there may be no store yet
        rows = history.query(
            f"SELECT attempt, step, layer, complete FROM {view} WHERE run_id = ? ORDER BY ALL", [run_id]
        ).to_pylist()
        return [(row["attempt"], row["step"], row["layer"], row["complete"]) for row in rows]
    return []


def sampled(attempt: int, last: int, every: int) -> list[tuple[int, int, int, bool]]:
    return [(attempt, step, layer, True) for step in range(0, last + 1, every) for layer in range(LAYERS)]


def pids(marker: str, words: str) -> list[int]:
    return [pid for pid, command in marked(marker).items() if words in command]


def kill(marker: str, words: str) -> None:
    for pid in pids(marker, words):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Cluster:
    """A Ray on an address that stays, with an aggregator on it; it comes and goes."""

    def __init__(self, store: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.store = store
        self.marker, self._environment = marked_environment()
        self._folder = tempfile.mkdtemp(prefix="ew-ray-")  # pytest's own are too long for the names of Ray's sockets
        self.served: Served | None = None

    def start(self) -> None:
        head = [*RAY, "start", "--head", "--node-ip-address", "127.0.0.1", "--port", str(self.port), "--num-cpus", "2"]
        small = ["--include-dashboard", "false", "--object-store-memory", str(256 << 20), "--temp-dir", self._folder]
        subprocess.run([*head, *small], env=self._environment, capture_output=True, check=True, timeout=120)
        self.served = start_serve(self.store, "--address", self.address)

    def shard(self) -> int:
        (pid,) = wait_until(lambda: pids(self.marker, "ray::Shard"), "the shard")
        return pid

    def kill(self) -> None:
        """serve, raylet, GCS and every actor at once."""
        end_all(self.marker)
        if self.served is not None:
            end_all(self.served.marker)
            self.served.process.wait(30)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


@pytest.fixture
def cluster(tmp_path):
    cluster = Cluster(tmp_path / "store")
    yield cluster
    cluster.close()


def test_a_job_trains_through_every_outage_and_delivers_what_the_job_before_it_left(cluster, job_environment, tmp_path):
    """Absent at the start, there later, slow, its shard killed, gone with its Ray, back."""
    marker, every = job_environment["EIGENWATCH_TEST_MARKER"], 3
    first, second = tmp_path / "first", tmp_path / "second"
    run_id = f"outages-{THIS}"
    options = ("--run-id", run_id, "--aggregator", cluster.address, "--every", str(every), "--until-go")
    steps = ("--steps", "100000", "--step-seconds", "0.3", "--close-seconds", "60")

    # Nobody is there, and everything dies: ranks and couriers.
    job = start_job(first, job_environment, *options, *steps)
    wait_until(lambda: step_of(first, 0) >= 4 and step_of(first, 1) >= 4, "step 4")
    wait_until(lambda: len(held := waits(run_id)) == 2 and min(held) >= 2 * LAYERS, "the partials of steps 0 and 3")
    end_all(marker)
    job.wait(PATIENCE_SECONDS)

    # Its second attempt starts without an aggregator too.
    job = start_job(second, job_environment, *options, *steps)

    def goes_on(steps: int) -> None:
        reached = step_of(second) + steps
        wait_until(lambda: min(step_of(second, 0), step_of(second, 1)) >= reached, f"{steps} more steps")

    goes_on(4)
    cluster.start()

    def stored(attempt: int, step: int) -> bool:
        return set(sampled(attempt, step, every)) <= set(records(cluster.store, run_id, "records_raw"))

    wait_until(lambda: stored(0, 3) and stored(1, 3), "what waited, of both attempts")
    # One rank may have begun another step: its record waits for the other rank until its deadline.
    wait_until(lambda: len(spools(run_id)) == 2, "the end of what the first attempt left")

    shard = cluster.shard()
    os.kill(shard, signal.SIGSTOP)
    goes_on(6)
    os.kill(shard, signal.SIGCONT)
    slow = step_of(second) // every * every
    wait_until(lambda: stored(1, slow), "the steps of the slow time")

    os.kill(shard, signal.SIGKILL)
    goes_on(3)
    cluster.kill()
    goes_on(6)
    cluster.start()
    (second / "go").touch()
    assert job.wait(PATIENCE_SECONDS) == 0, (second / "stderr").read_text()

    closed = [json.loads((second / f"closed-{rank}.json").read_text()) for rank in range(2)]
    assert [one["undelivered"] for one in closed] == [0, 0]
    assert all(one["seconds"] < 90 for one in closed)
    complete = [one for one in records(cluster.store, run_id, "records_raw") if one[3] and one[0] == 1]
    assert complete == sampled(1, step_of(second), every)
    before = [one for one in records(cluster.store, run_id, "records_raw") if one[0] == 0]
    assert sampled(0, 3, every) == [one for one in before if one[1] <= 3]
    with open_history(cluster.store) as history:
        runs = history.query("SELECT attempt, status FROM runs ORDER BY attempt").to_pylist()
    assert runs == [{"attempt": 0, "status": "lost"}, {"attempt": 1, "status": "finished"}]
    assert spools(run_id) == []


def spools(run_id: str) -> list[Path]:
    return list(Path(os.environ["EIGENWATCH_SPOOL"]).glob(f"{run_id}-*"))


def waits(run_id: str) -> list[int]:
    """How many partials each rank's spool holds, the fewest first."""
    return sorted(len(list(spool.glob("*.arrow"))) for spool in spools(run_id))


def test_an_embedded_aggregator_that_is_killed_is_started_again_and_nothing_is_lost(job_environment, tmp_path):
    marker, out, store = job_environment["EIGENWATCH_TEST_MARKER"], tmp_path / "job", tmp_path / "store"
    job = start_job(
        out, job_environment, "--run-id", "serve-dies", "--store", str(store), "--every", "3", "--until-go",
        "--steps", "100000", "--step-seconds", "0.3", "--close-seconds", "60",
    )  # fmt: skip
    wait_until(lambda: records(store, "serve-dies"), "the first records")
    (shard,) = pids(marker, "ray::Shard")
    kill(marker, "eigenwatch.cli serve")
    wait_until(lambda: shard not in marked(marker), "the end of the old shard")
    killed_at = step_of(out)
    wait_until(
        lambda: any(step > killed_at for _, step, _, _ in records(store, "serve-dies")), "records of later steps"
    )
    (out / "go").touch()
    assert job.wait(PATIENCE_SECONDS) == 0, (out / "stderr").read_text()
    assert [json.loads((out / f"closed-{rank}.json").read_text())["undelivered"] for rank in range(2)] == [0, 0]
    assert records(store, "serve-dies") == sampled(0, step_of(out), 3)
    assert re.search(r"the embedded aggregator ended, see \S+; starting another in 0 s", (out / "stderr").read_text())
    # The agents of a Ray that was killed ask its GCS for a minute before they end.
    wait_for_the_end_of_all(marker, but_for="Agent")


def test_forked_children_close_nothing_and_do_not_hide_the_death_of_their_rank(served, job_environment, tmp_path):
    marker, out = job_environment["EIGENWATCH_TEST_MARKER"], tmp_path / "job"
    job = start_job(
        out, job_environment, "--run-id", f"forks-{THIS}", "--aggregator", served.address, "--every", "2",
        "--steps", "1000", "--step-seconds", "0.1", "--workers", "2", "--forks", ranks=1,
    )  # fmt: skip
    wait_until(lambda: step_of(out) >= 7 and records(served.store, f"forks-{THIS}"), "step 7 and a record")
    job.kill()
    job.wait(PATIENCE_SECONDS)
    stays = int((out / "forked").read_text())
    # The forked child holds the courier's pipe, yet the courier delivers, and ends.
    wait_until(lambda: not pids(marker, "eigenwatch.agent.courier"), "the end of the courier")
    assert stays in marked(marker)
    assert set(sampled(0, 7, 2)) <= set(records(served.store, f"forks-{THIS}"))
    with open_history(served.store) as history:
        assert history.query("SELECT status FROM runs WHERE run_id = ?", [f"forks-{THIS}"]).to_pylist() == [
            {"status": "lost"}
        ]
    assert spools(f"forks-{THIS}") == []


def test_a_job_with_forked_loaders_closes_as_any_other(served, job_environment, tmp_path):
    out = tmp_path / "job"
    job = start_job(
        out, job_environment, "--run-id", f"loaders-{THIS}", "--aggregator", served.address, "--every", "2",
        "--steps", "6", "--workers", "2", "--forks", ranks=1,
    )  # fmt: skip
    assert job.wait(PATIENCE_SECONDS) == 0, (out / "stderr").read_text()
    closed = json.loads((out / "closed-0.json").read_text())
    assert closed["undelivered"] == 0
    assert closed["seconds"] < 45
    assert records(served.store, f"loaders-{THIS}") == sampled(0, 5, 2)
