"""`eigenwatch serve` on a Ray cluster that is there already, with two trainings at once."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from eigenwatch.history import open_history
from eigenwatch.schemas.ray_token import token_environment

from tests.conftest import start_serve, stop_serve
from tests.jobs.launch import start_job
from tests.processes import PATIENCE_SECONDS, end_all, marked_environment


@pytest.fixture
def ray_cluster():
    """A Ray as an operator starts one, who says that there is a GPU; yields its address."""
    folder = tempfile.mkdtemp(prefix="ew-ray-")  # pytest's own are too long for the names of Ray's sockets
    marker, environment = marked_environment()
    ray = Path(sys.executable).parent / "ray"
    head = [ray, "start", "--head", "--port", "0", "--num-cpus", "2", "--num-gpus", "1", "--include-dashboard", "false"]
    memory = ["--object-store-memory", str(256 << 20), "--temp-dir", folder]
    started = subprocess.run([*head, *memory], env=environment, capture_output=True, text=True, check=True)
    (address,) = set(re.findall(r"--address='([^']+)'", started.stdout))
    yield address
    end_all(marker)
    shutil.rmtree(folder, ignore_errors=True)


def free_gpus(address: str) -> float:
    script = "import ray, sys; ray.init(address=sys.argv[1]); print(ray.available_resources().get('GPU', 0.0))"
    environment = os.environ | token_environment(dict(os.environ))
    command = [sys.executable, "-c", script, address]
    asked = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(asked.stdout)


def test_an_existing_cluster_serves_two_trainings_at_once(ray_cluster, job_environment, tmp_path):
    served = start_serve(tmp_path / "store", "--address", ray_cluster, "--shards", "2")
    try:
        assert served.address == ray_cluster
        assert free_gpus(ray_cluster) == 0.0, "each shard asked for half of it"
        jobs = [
            start_job(
                tmp_path / run, job_environment, "--run-id", run, "--aggregator", ray_cluster,
                "--steps", "7", "--every", "3", ranks=1,
            )
            for run in ("first", "second")
        ]  # fmt: skip
        for job, run in zip(jobs, ("first", "second"), strict=True):
            assert job.wait(PATIENCE_SECONDS) == 0, (tmp_path / run / "stderr").read_text()
    finally:
        assert stop_serve(served) == 0
    with open_history(tmp_path / "store") as history:
        counted = history.query(
            "SELECT run_id, count(*) AS records, bool_and(complete) AS whole FROM records GROUP BY ALL ORDER BY run_id"
        ).to_pylist()
        statuses = history.query("SELECT DISTINCT status FROM runs").to_pylist()
    assert counted == [
        {"run_id": "first", "records": 9, "whole": True},
        {"run_id": "second", "records": 9, "whole": True},
    ]
    assert statuses == [{"status": "finished"}]


def test_a_second_aggregator_on_the_same_cluster_is_refused(served, tmp_path):
    command = [sys.executable, "-m", "eigenwatch.cli", "serve", "--metrics-port", "0", "--address", served.address]
    completed = subprocess.run(
        [*command, "--store", str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert completed.returncode == 1
    assert "Error: an aggregator runs on this Ray cluster already" in completed.stderr
