"""An aggregator whose processes die goes on where it was: alerts, gauges and counters, on a real Ray."""

import os
import signal

import pytest
import torch
from eigenwatch.agent import attach
from eigenwatch.history import open_history

from tests.aggregator.test_shard import stored
from tests.conftest import start_serve, stop_serve
from tests.processes import wait_until
from tests.test_bad_input import Model
from tests.test_main_job import exposition
from tests.test_outage import Cluster, pids

WIDTH = 256


@pytest.fixture
def cluster(tmp_path):
    cluster = Cluster(tmp_path / "store")
    cluster.start()
    yield cluster
    cluster.close()


def collapsed_model() -> Model:
    """One layer whose activations lie in two directions, whatever comes in."""
    torch.manual_seed(0)
    model = Model(WIDTH)
    up = model.layers[0].mlp["up_proj"]
    with torch.no_grad():
        up.weight.copy_(torch.randn(WIDTH, 1) @ torch.randn(1, 8))
        up.bias.zero_()
    return model


def shown(cluster: Cluster, name: str) -> float | None:
    """The one value of a family on the endpoint; None where there is none, or nobody answers."""
    try:
        samples = exposition(cluster.served.metrics_url).get(name, [])
    except OSError:
        return None
    return samples[0].value if len(samples) == 1 else None


def test_whatever_dies_an_alert_stays_and_no_counter_falls(cluster):
    model, batch = collapsed_model(), torch.randn(400, 8)
    with attach(model, run_id="dies", every=1, aggregator=cluster.address) as agent:

        def train(*steps: int) -> None:
            for step in steps:
                model(batch).sum().backward()
                agent.step(step)
            wait_until(lambda: shown(cluster, "eigenwatch_last_record_step") == steps[-1], f"step {steps[-1]}")

        train(0, 1, 2)
        assert shown(cluster, "eigenwatch_alert_active") == 1
        wait_until(lambda: shown(cluster, "eigenwatch_records_written") == 3, "three records")
        received = shown(cluster, "eigenwatch_partials_received")
        before = {pid for words in ("ray::Shard", "ray::Coordinator") for pid in pids(cluster.marker, words)}
        assert len(before) == 2
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        taken_at = shown(cluster, "eigenwatch_snapshot_timestamp_seconds")
        wait_until(lambda: set(pids(cluster.marker, "ray::Shard")) - before, "another shard")
        wait_until(lambda: shown(cluster, "eigenwatch_snapshot_timestamp_seconds") > taken_at, "their first snapshot")
        wait_until(lambda: shown(cluster, "eigenwatch_alert_active") == 1, "the alert, before any new sample")
        assert shown(cluster, "eigenwatch_last_record_step") == 2
        assert shown(cluster, "eigenwatch_records_written") is not None

        train(3, 4, 5)
        assert len(stored(cluster.store, "alerts", "dies")) == 1, "it fires once"
        wait_until(lambda: shown(cluster, "eigenwatch_records_written") == 6, "six records, of both shards")
        assert shown(cluster, "eigenwatch_partials_received") >= received + 3

        assert stop_serve(cluster.served) == 0
        cluster.served = start_serve(cluster.store, "--address", cluster.address)
        wait_until(lambda: shown(cluster, "eigenwatch_alert_active") == 1, "the alert, from another service")
        assert shown(cluster, "eigenwatch_records_written") == 6
        train(6)
        assert shown(cluster, "eigenwatch_partials_received") >= received + 4
        assert len(stored(cluster.store, "alerts", "dies")) == 1
    with open_history(cluster.store) as history:
        (run,) = history.query("SELECT attempt, status FROM runs").to_pylist()
    assert run == {"attempt": 0, "status": "finished"}
