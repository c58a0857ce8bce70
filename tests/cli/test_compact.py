"""`eigenwatch compact`, as a shell sees it."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from eigenwatch.cli.compact import compact
from eigenwatch.history import open_history
from eigenwatch.schemas import STORE_VARIABLE
from eigenwatch.schemas.store import open_store

from tests.history.stored import record, spectrum, write


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for step in range(3):
        write(tmp_path, "r", "records", record(step))
        write(tmp_path, "r", "eigenvalues", spectrum(step))
    return tmp_path


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(compact, [str(one) for one in arguments])


def lines(*arguments: Any) -> list[str]:
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


def test_it_says_what_it_did(store: Path) -> None:
    assert lines("--store", store) == [
        "6 files merged into 2; 0 replaced before removed",
        "6 replaced files stay for queries under way",
    ]
    assert lines("--store", store, "--grace", "0s") == ["0 files merged into 0; 6 replaced before removed"]
    assert lines("--store", store) == ["0 files merged into 0; 0 replaced before removed"]


def test_a_machine_reads_the_same(store: Path) -> None:
    done = json.loads("\n".join(lines("--store", store, "--json")))
    assert done == {
        "merged": 6,
        "into": 2,
        "removed": 0,
        "waiting": 6,
        "spectra_dropped": 0,
        "unreadable": 0,
        "dry_run": False,
    }


def test_a_dry_run_says_what_would_be_done(store: Path) -> None:
    before = sorted(store.rglob("*"))
    assert lines("--store", store, "--dry-run", "--keep-eigenvalues", "1d") == [
        "6 files would be merged into 2; 0 replaced before would be removed",
        "6 replaced files would stay for queries under way",
        "3 spectra would be dropped",
    ]
    assert sorted(store.rglob("*")) == before


def test_spectra_of_an_age_are_dropped(store: Path) -> None:
    assert lines("--store", store, "--keep-eigenvalues", "4w")[-1] == "3 spectra dropped"
    with open_history(store) as history:
        assert history.query("FROM eigenvalues").num_rows == 0
        assert history.query("FROM records").num_rows == 3


def test_the_store_comes_from_the_environment_where_none_is_given(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STORE_VARIABLE, str(store))
    assert lines()[0].startswith("6 files merged into 2")


def test_wrong_usage_says_how(store: Path) -> None:
    for option in ("--keep-eigenvalues", "--grace"):
        done = run("--store", store, option, "30")
        assert done.exit_code == 2
        assert "'30' is no duration: write 90s, 15m, 12h, 30d or 4w" in done.output
    done = run("--store", store, "--keep-eigenvalues", "0d")
    assert done.exit_code == 2
    assert "--keep-eigenvalues must be more than nothing" in done.output


def test_a_store_that_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    done = run("--store", tmp_path / "nowhere")
    assert done.exit_code == 1
    assert done.output == f"Error: no store at {tmp_path}/nowhere: pass --store, or set {STORE_VARIABLE}\n"


def test_two_at_once_exclude_each_other(store: Path) -> None:
    with open_store(store).lock():
        done = run("--store", store)
    assert (done.exit_code, done.output) == (1, f"Error: another compaction of {store} is under way: let it finish\n")


def test_help_has_an_example() -> None:
    assert "eigenwatch compact --store s3://telemetry/runs --keep-eigenvalues 30d" in run("--help").output
