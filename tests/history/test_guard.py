"""The limits of time: a query that takes too long ends, and leaves the session as it was."""

from pathlib import Path

import pytest
from eigenwatch.history import open_history

from tests.history.stored import record, write

FOR_EVER = [
    "SELECT count(*) FROM range(1000000000000)",
    "WITH RECURSIVE n AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
    "SELECT sleep_ms(86400000)",
]


@pytest.mark.parametrize("statement", FOR_EVER)
def test_a_query_that_takes_longer_is_stopped(tmp_path: Path, statement: str) -> None:
    with (
        open_history(tmp_path, timeout_seconds=0.2) as history,
        pytest.raises(ValueError, match=r"\Astopped after 0\.2 seconds: ask about fewer[^\n]*\Z"),
    ):
        history.query(statement)


def test_a_session_goes_on_after_a_query_was_stopped(tmp_path: Path) -> None:
    write(tmp_path, "r", "records", record(0))
    with open_history(tmp_path, timeout_seconds=2) as history:
        with pytest.raises(ValueError, match="stopped after 2 seconds"):
            history.query(FOR_EVER[0])
        assert history.query("SELECT 1 AS one").num_rows == 1


@pytest.mark.parametrize("seconds", [0, -1])
def test_no_time_at_all_is_refused(tmp_path: Path, seconds: float) -> None:
    with pytest.raises(ValueError, match="timeout_seconds must be positive, got"):
        open_history(tmp_path, timeout_seconds=seconds)
