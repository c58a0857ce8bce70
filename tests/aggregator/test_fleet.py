"""Shards that come and go while a run goes on: who owns what, and that nothing is lost or counted twice."""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from eigenwatch.history import open_history
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import start_serve
from tests.jobs.launch import start_job, step_of
from tests.processes import PATIENCE_SECONDS, end_all, marked, wait_until

LAYERS = 3


@pytest.fixture
def two_shards(tmp_path):
    """An aggregator of two shards, one of which is soon taken for away."""
    served = start_serve(tmp_path / "store", "--shards", "2", "--away", "3", "--deadline", "5")
    yield served
    for pid in marked(served.marker):
        os.kill(pid, signal.SIGCONT)
    served.process.kill()
    end_all(served.marker)


def shard_pids(served) -> list[int]:
    found = []
    for pid in marked(served.marker):
        title = Path(f"/proc/{pid}/cmdline").read_bytes()
        if title.startswith(b"ray::ShardActor"):
            found.append(pid)
    return sorted(found)


def gauge(served, name: str, **labels: str) -> list[float]:
    import urllib.request

    text = urllib.request.urlopen(served.metrics_url, timeout=10).read().decode()
    return [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]


def test_layers_of_a_shard_that_hangs_are_taken_over_and_given_back(two_shards, job_environment, tmp_path):
    out = tmp_path / "job"
    job = start_job(
        out, job_environment, "--run-id", "moves", "--aggregator", two_shards.address,
        "--steps", "100000", "--until-go", "--every", "5", "--step-seconds", "0.05",
    )  # fmt: skip
    wait_until(lambda: len(gauge(two_shards, "eigenwatch_hard_rank", run="moves")) == LAYERS, "every layer's gauge")
    stopped, _ = wait_until(lambda: pids if len(pids := shard_pids(two_shards)) == 2 else [], "two shards")
    os.kill(stopped, signal.SIGSTOP)
    wait_until(lambda: gauge(two_shards, "eigenwatch_shards", state="away") == [1.0], "one that is away")
    moved_at = step_of(out)

    def newest() -> Counter[int]:
        with open_history(two_shards.store) as history:
            rows = history.query("SELECT layer, max(step) AS step FROM records GROUP BY layer").to_pylist()
        return Counter({row["layer"]: row["step"] for row in rows})

    wait_until(lambda: len(newest()) == LAYERS and min(newest().values()) > moved_at, "records of all layers again")
    assert len(gauge(two_shards, "eigenwatch_hard_rank", run="moves")) == LAYERS, "each series from one shard"
    os.kill(stopped, signal.SIGCONT)
    wait_until(lambda: gauge(two_shards, "eigenwatch_shards", state="here") == [2.0], "both shards")
    back_at = step_of(out)
    wait_until(lambda: min(newest().values()) > back_at, "records of all layers once more")
    assert len(gauge(two_shards, "eigenwatch_hard_rank", run="moves")) == LAYERS
    (out / "go").touch()
    assert job.wait(PATIENCE_SECONDS) == 0, (out / "stderr").read_text()
    last = step_of(out)
    with open_history(two_shards.store) as history:
        rows = history.query("SELECT step, layer, complete FROM records ORDER BY step, layer").to_pylist()
    steps = sorted({row["step"] for row in rows})
    assert [(row["step"], row["layer"]) for row in rows] == [(step, layer) for step in steps for layer in range(LAYERS)]
    assert all(row["complete"] for row in rows)
    assert steps == list(range(steps[0], steps[-1] + 1, 5))
    assert last - steps[-1] <= 5
    assert sum(gauge(two_shards, "eigenwatch_partials_dropped_total", run="moves")) == 0
