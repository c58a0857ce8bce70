"""What the tests of the running system share: one aggregator with a real Ray for the session, and jobs beside it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.processes import NEVER_BEHIND, end_all, marked_environment

torch.set_num_threads(1)


class Served(NamedTuple):
    """A running `eigenwatch serve`."""

    address: str
    metrics_url: str
    store: Path
    marker: str
    """Which processes are its own, its Ray's included: see `tests.processes`."""
    process: "subprocess.Popen[bytes]"


def start_serve(store: Path | str, *options: str) -> Served:
    """Where `options` do not say otherwise, it lets jobs keep their cadence however slow this machine is."""
    marker, environment = marked_environment()
    command = [sys.executable, "-m", "eigenwatch.cli", "serve", "--json", "--store", str(store), "--metrics-port", "0"]
    process = subprocess.Popen([*command, *NEVER_BEHIND, *options], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    return Served(ready["address"], ready["metrics_url"], Path(store), marker, process)


def stop_serve(served: Served) -> int:
    served.process.terminate()
    try:
        return served.process.wait(120)
    finally:
        end_all(served.marker)


@pytest.fixture(scope="session", autouse=True)
def spools() -> Iterator[Path]:
    """Where the jobs of this session leave their partials: what an earlier session left is not delivered here."""
    folder = Path(tempfile.mkdtemp(prefix="eigenwatch-test-spools-", dir="/dev/shm"))
    os.environ["EIGENWATCH_SPOOL"] = str(folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """An aggregator that the tests of a session share; every test has runs of its own."""
    served = start_serve(tmp_path_factory.mktemp("store"), "--deadline", "5")
    yield served
    stop_serve(served)


@pytest.fixture
def job_environment() -> Iterator[dict[str, str]]:
    """An environment for a child whose whole offspring is ended after the test."""
    marker, environment = marked_environment()
    environment["OMP_NUM_THREADS"] = "1"
    yield environment
    end_all(marker)


def pytest_report_header() -> str:
    return f"eigenwatch tests in {os.cpu_count()} CPUs, torch {torch.__version__}"
