"""`eigenwatch demo` as a person sees it, and when the person presses Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from eigenwatch.history import open_history

from tests.jobs.launch import read_whole_store
from tests.processes import MARKER, PATIENCE_SECONDS, marked, wait_for_the_end_of_all, wait_until


def start_demo(store: Path, environment: dict[str, str], *options: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "eigenwatch.cli", "demo", "--store", str(store), "--run-id", "shown", *options],
        env=environment | {"COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_the_demo_shows_what_it_found_and_where_it_lies(job_environment, tmp_path):
    demo = start_demo(tmp_path / "store", job_environment, "--steps", "33", "--every", "4")
    said, _ = demo.communicate(timeout=PATIENCE_SECONDS)
    assert demo.returncode == 0, said
    for layer in range(8):
        assert re.search(rf"│ +{layer} │ +256 │ +9 │", said)
    assert 'eigenwatch_hard_rank{layer="0",run="shown",site="post"}' in said
    assert "Alerts: none." in said
    assert "eigenwatch query --store" in said
    assert (tmp_path / "store" / "run_id=shown" / "heatmaps.png").read_bytes().startswith(b"\x89PNG")
    with open_history(tmp_path / "store") as history:
        (counted,) = history.query("SELECT count(*) AS records, bool_and(complete) AS whole FROM records").to_pylist()
    assert counted == {"records": 9 * 8, "whole": True}
    assert not marked(job_environment[MARKER])


@pytest.mark.parametrize("moment", ["while Ray starts", "while it trains"])
def test_ctrl_c_leaves_a_readable_store_and_no_process(moment, job_environment, tmp_path):
    store, marker = tmp_path / "store", job_environment[MARKER]
    demo = start_demo(store, job_environment, "--steps", "2000", "--every", "2")
    if moment == "while Ray starts":
        wait_until(lambda: any("gcs_server" in command for command in marked(marker).values()), "Ray")
    else:
        wait_until(lambda: list(store.rglob("records/part-*.parquet")), "a first record")
    os.killpg(demo.pid, signal.SIGINT)  # as a terminal does it
    said, _ = demo.communicate(timeout=PATIENCE_SECONDS)
    assert "Traceback" not in said, said
    wait_for_the_end_of_all(marker)
    files = read_whole_store(store)
    if moment == "while it trains":
        assert files > 0
        assert demo.returncode == 0, said
        with open_history(store) as history:
            (run,) = history.query("SELECT status FROM runs").to_pylist()
            (counted,) = history.query("SELECT bool_and(complete) AS whole FROM records").to_pylist()
        assert run["status"] == "finished"
        assert counted["whole"]
