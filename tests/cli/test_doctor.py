"""`eigenwatch doctor`: what it says of this machine, and that it ends in failure where something needed is broken."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.processes import end_all, marked_environment, wait_for_the_end_of_all

NEEDED = {"Python", "torch", "solver", "store", "DuckDB", "endpoint", "Ray"}
OPTIONAL = {"GPU", "shared memory", "pictures", "promtool"}


class Visit(NamedTuple):
    """A doctor that is at work."""

    process: "subprocess.Popen[str]"
    marker: str

    def result(self) -> tuple[int, str, str]:
        output, errors = self.process.communicate(timeout=180)
        return self.process.returncode, output, errors


def visit(*options: str) -> Visit:
    marker, environment = marked_environment()
    command = [sys.executable, "-m", "eigenwatch.cli", "doctor", *options]
    pipe = subprocess.PIPE
    return Visit(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment), marker)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "file").touch()
    return folder


@pytest.fixture(scope="module")
def visits(folder: Path) -> Iterator[tuple[Visit, Visit]]:
    """To a store that can be written, and to one below a file; both at once, since each starts a Ray."""
    both = visit("--json", "--store", str(folder / "store")), visit("--store", str(folder / "file" / "store"))
    yield both
    for one in both:
        end_all(one.marker)


def test_here_everything_that_is_needed_works(visits, folder):
    code, output, errors = visits[0].result()
    assert code == 0, output + errors
    findings = {one["subject"]: one for one in json.loads(output)}
    assert findings.keys() == NEEDED | OPTIONAL
    assert {findings[subject]["state"] for subject in NEEDED} == {"works"}
    assert {findings[subject]["state"] for subject in OPTIONAL} <= {"works", "missing"}
    assert all(one["detail"] for one in findings.values())
    assert not (folder / "store").exists()
    wait_for_the_end_of_all(visits[0].marker)


def test_a_store_that_cannot_be_written_is_broken_with_the_remedy_and_the_rest_is_still_tried(visits, folder):
    code, output, errors = visits[1].result()
    assert code == 1
    assert "Traceback" not in output + errors
    lines = {line[4:18].strip(): line for line in output.splitlines()}
    assert lines.keys() == NEEDED | OPTIONAL
    broken = [line for line in lines.values() if line.startswith("!!")]
    assert broken == [f"!!  {'store':14} {folder / 'file' / 'store'} cannot be written: pass another with --store"]


def test_help_has_an_example():
    code, output, _ = visit("--help").result()
    assert code == 0
    assert "Example: eigenwatch doctor" in output
