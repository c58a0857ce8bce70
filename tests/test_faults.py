"""What happens when something dies: the training goes on, the store stays readable, and no sampled step is lost."""

import json
import os
import signal
import urllib.request

import pytest
from eigenwatch.history import open_history

from tests.conftest import start_serve, stop_serve
from tests.jobs.launch import read_whole_store, start_job, step_of
from tests.processes import PATIENCE_SECONDS, end_all, marked, wait_for_the_end_of_all, wait_until

LAYERS = 3


@pytest.fixture
def own_serve(tmp_path):
    """An aggregator that a test may hurt."""
    served = start_serve(tmp_path / "store")
    yield served
    served.process.kill()
    end_all(served.marker)


def records(store, run_id: str) -> list[tuple[int, int, bool]]:
    with open_history(store) as history:
        rows = history.query(
            "SELECT step, layer, complete FROM records WHERE run_id = ? ORDER BY step, layer", [run_id]
        ).to_pylist()
    return [(row["step"], row["layer"], row["complete"]) for row in rows]


def test_training_survives_the_death_of_ray_and_says_what_was_not_delivered(own_serve, job_environment, tmp_path):
    out = tmp_path / "job"
    job = start_job(
        out, job_environment, "--run-id", "ray-dies", "--aggregator", own_serve.address,
        "--steps", "100000", "--until-go", "--every", "3", "--step-seconds", "0.1", "--close-seconds", "5",
    )  # fmt: skip
    wait_until(lambda: list(own_serve.store.rglob("records/part-*.parquet")), "the first records")
    end_all(own_serve.marker)  # serve, raylet, GCS and every actor at once
    died_at = step_of(out)
    wait_until(lambda: step_of(out) >= died_at + 10, "ten more steps")
    (out / "go").touch()
    assert job.wait(PATIENCE_SECONDS) == 0, (out / "stderr").read_text()
    for rank in range(2):
        closed = json.loads((out / f"closed-{rank}.json").read_text())
        assert closed["undelivered"] > 0
        assert closed["seconds"] < 10
    assert "were not delivered and remain in" in (out / "stderr").read_text()
    assert read_whole_store(own_serve.store) > 0


def test_sigterm_to_serve_writes_everything_that_it_received(own_serve, job_environment, tmp_path):
    out = tmp_path / "job"
    job = start_job(
        out, job_environment, "--run-id", "serve-ends", "--aggregator", own_serve.address,
        "--steps", "9", "--every", "2", "--hold",
    )  # fmt: skip
    wait_until(lambda: (out / "trained-0").exists() and (out / "trained-1").exists(), "the end of training")

    def received() -> int:
        with urllib.request.urlopen(own_serve.metrics_url) as response:
            lines = response.read().decode().splitlines()
        name = 'eigenwatch_partials_received_total{run="serve-ends"} '
        return next((int(float(line.removeprefix(name))) for line in lines if line.startswith(name)), 0)

    wait_until(lambda: received() == 5 * LAYERS * 2, "the arrival of every partial")
    assert stop_serve(own_serve) == 0
    expected = [(step, layer, True) for step in range(0, 9, 2) for layer in range(LAYERS)]
    assert records(own_serve.store, "serve-ends") == expected
    assert not marked(own_serve.marker)
    job.send_signal(signal.SIGKILL)


def test_a_killed_trainer_leaves_a_readable_store_with_every_closed_record_and_no_process(job_environment, tmp_path):
    out, store = tmp_path / "job", tmp_path / "store"
    job = start_job(
        out, job_environment, "--run-id", "trainer-dies", "--store", str(store),
        "--steps", "100000", "--every", "2", "--step-seconds", "0.2",
    )  # fmt: skip
    early = {(step, layer) for step in range(0, 7, 2) for layer in range(LAYERS)}

    def whole() -> set[tuple[int, int]]:
        return {(step, layer) for step, layer, complete in records(store, "trainer-dies") if complete}

    wait_until(lambda: any(store.rglob("records/part-*.parquet")) and whole() >= early, "complete records")
    sampled = step_of(out) - 6
    marker = job_environment["EIGENWATCH_TEST_MARKER"]
    for pid, command in marked(marker).items():
        if "tests.jobs.train" in command:
            os.kill(pid, signal.SIGKILL)
    job.wait(PATIENCE_SECONDS)
    wait_for_the_end_of_all(marker)
    assert read_whole_store(store) > 0
    # What the outbox's threads had not handed over yet died with them.
    assert whole() >= {(step, layer) for step in range(0, sampled, 2) for layer in range(LAYERS)}
    with open_history(store) as history:
        (run,) = history.query("SELECT status FROM runs").to_pylist()
    assert run["status"] == "lost"


def test_couriers_that_die_before_the_end_are_replaced_and_everything_is_delivered(served, job_environment, tmp_path):
    out = tmp_path / "job"
    job = start_job(
        out, job_environment, "--run-id", "couriers-die", "--aggregator", served.address,
        "--steps", "9", "--every", "2", "--hold",
    )  # fmt: skip
    wait_until(lambda: (out / "trained-0").exists() and (out / "trained-1").exists(), "the end of training")
    for pid, command in marked(job_environment["EIGENWATCH_TEST_MARKER"]).items():
        if "eigenwatch.agent.courier" in command:
            os.kill(pid, signal.SIGKILL)
    (out / "go").touch()
    assert job.wait(PATIENCE_SECONDS) == 0, (out / "stderr").read_text()
    assert [json.loads((out / f"closed-{rank}.json").read_text())["undelivered"] for rank in range(2)] == [0, 0]
    expected = [(step, layer, True) for step in range(0, 9, 2) for layer in range(LAYERS)]
    assert records(served.store, "couriers-die") == expected
