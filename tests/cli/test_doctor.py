"""`eigenwatch doctor`: what it says of this machine, and that it ends in failure where something needed is broken."""

import json
import subprocess
import sys

from tests.processes import MARKER, marked, wait_until

NEEDED = {"Python", "torch", "solver", "store", "DuckDB", "endpoint", "Ray"}
OPTIONAL = {"GPU", "shared memory", "pictures", "promtool"}


def doctor(*options: str, environment: dict[str, str]) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "eigenwatch.cli", "doctor", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    return done.returncode, done.stdout, done.stderr


def test_here_everything_that_is_needed_works(job_environment, tmp_path):
    code, output, errors = doctor("--json", "--store", str(tmp_path / "store"), environment=job_environment)
    assert code == 0, output + errors
    findings = {one["subject"]: one for one in json.loads(output)}
    assert findings.keys() == NEEDED | OPTIONAL
    assert {findings[subject]["state"] for subject in NEEDED} == {"works"}
    assert {findings[subject]["state"] for subject in OPTIONAL} <= {"works", "missing"}
    assert all(one["detail"] for one in findings.values())
    assert not (tmp_path / "store").exists()
    wait_until(lambda: not marked(job_environment[MARKER]), 20, "the end of the Ray that was tried")


def test_a_store_that_cannot_be_written_is_broken_with_the_remedy_and_the_rest_is_still_tried(
    job_environment, tmp_path
):
    (tmp_path / "file").touch()
    store = tmp_path / "file" / "store"
    code, output, errors = doctor("--store", str(store), environment=job_environment)
    assert code == 1
    assert "Traceback" not in output + errors
    lines = {line[4:18].strip(): line for line in output.splitlines()}
    assert lines.keys() == NEEDED | OPTIONAL
    broken = [line for line in lines.values() if line.startswith("!!")]
    assert broken == [f"!!  {'store':14} {store} cannot be written: pass another with --store"]


def test_help_has_an_example(job_environment):
    code, output, _ = doctor("--help", environment=job_environment)
    assert code == 0
    assert "Example: eigenwatch doctor" in output
