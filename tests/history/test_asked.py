"""Which runs a statement asks about: never too few, and no more where it is plain."""

import os
from pathlib import Path

import pytest
from eigenwatch.history import History, open_history
from eigenwatch.history.asked import asked_runs
from eigenwatch.history.guard import check_statement

from tests.history.stored import alert, record, run, spectrum, write


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asked")
    for name in ("a", "b", "c"):
        write(folder, name, "records", *[record(step) for step in (0, 10)])
        write(folder, name, "eigenvalues", spectrum(0))
        write(folder, name, "alerts", alert(f"alert-{name}", 0, written=0))
        write(folder, name, "runs", run(written=0))
    return folder


@pytest.fixture(scope="module")
def history(store: Path):
    with open_history(store) as history:
        yield history


@pytest.fixture
def broken(store: Path):
    """The runs a and b can be read, of c not even the list of files."""
    folder = store / "run_id=c" / "records"
    hidden = store / "run_id=c" / "hidden"
    folder.rename(hidden)
    folder.mkdir()
    (folder / "part-0.parquet").write_bytes(b"not parquet at all")
    yield
    (folder / "part-0.parquet").unlink()
    os.rmdir(folder)
    hidden.rename(folder)


PLAIN = [
    "FROM records WHERE run_id = 'a'",
    "FROM records WHERE 'a' = run_id AND step > 5",
    "FROM records AS r WHERE r.run_id = 'a'",
    "FROM records WHERE step > 5 AND (layer = 0 AND run_id IN ('a', 'b'))",
    "FROM main.records_raw WHERE run_id = 'a'",
    "FROM (FROM records WHERE run_id = 'a') WHERE step = 0",
    "WITH one AS (FROM records WHERE run_id = 'a') FROM one JOIN one AS other USING (step)",
    "FROM records WHERE run_id = 'a' UNION ALL FROM records WHERE run_id = 'b'",
    "SELECT (SELECT count(*) FROM records WHERE run_id = 'b') FROM records WHERE run_id = 'a'",
    "FROM layer_summary('a')",
    "FROM layer_summary(run := 'a', at_site := 'pre') RIGHT JOIN range(1) ON true",
    "FROM compare('a', 'b')",
    "FROM width_points(['a', 'b'])",
    "FROM alert_evidence('alert-a', 'a')",
    "FROM alert_evidence('alert-a', run := 'a')",
    "FROM spectrum('a', 0, 0)",
    "EXPLAIN FROM records WHERE run_id = 'a'",
]


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("statement", PLAIN)
def test_a_statement_about_some_runs_looks_at_no_other(history: History, statement: str) -> None:
    assert history.query(statement).num_rows > 0


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("statement", ["FROM records", "FROM alert_evidence('alert-a')"])
def test_a_statement_about_all_runs_finds_the_broken_one(history: History, statement: str) -> None:
    with pytest.raises(ValueError, match=r"run_id=c/records/part-0\.parquet"):
        history.query(statement)


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize(
    ("statement", "parameters"),
    [
        ("FROM records WHERE run_id = ?", ["a"]),
        ("FROM records WHERE step >= ? AND run_id IN (?, ?)", [0, "a", "b"]),
        ("FROM records WHERE run_id = $run", {"run": "a"}),
        ("FROM layer_summary(?)", ["a"]),
        ("FROM width_points($runs)", {"runs": ["a", "b"]}),
    ],
)
def test_parameters_name_runs_too(history: History, statement: str, parameters) -> None:
    assert history.query(statement, parameters).num_rows > 0


ALL = [
    ("SELECT DISTINCT run_id FROM records", 3),
    ("SELECT DISTINCT run_id FROM records WHERE run_id = 'a' OR step = 0", 3),
    ("SELECT DISTINCT run_id FROM records WHERE run_id <> 'a'", 2),
    ("SELECT DISTINCT run_id FROM records WHERE run_id = lower('A')", 1),
    ("SELECT DISTINCT r.run_id FROM records AS r JOIN runs USING (run_id) WHERE runs.run_id = 'a' OR true", 3),
    ("SELECT (SELECT any_value(run_id) FROM records WHERE run_id = 'b') AS b, * FROM runs", 3),
    ("SELECT (SELECT count(*) FROM records WHERE runs.run_id = 'a') AS n FROM runs WHERE run_id = 'a'", 1),
    ("WITH RECORDS_A AS (FROM records) SELECT DISTINCT run_id FROM records_a", 3),
    ("WITH records AS (FROM records_raw) SELECT DISTINCT run_id FROM records", 3),
    ("FROM alert_evidence('alert-b')", 2),
    ("SELECT DISTINCT run_id FROM width_points((SELECT list(run_id) FROM runs))", 3),
    ("SELECT count(DISTINCT run_id) AS n FROM RECORDS HAVING n = 3", 1),
    ("SELECT DISTINCT run_id FROM records WHERE run_id IN (SELECT run_id FROM runs)", 3),
    ("PIVOT records ON layer IN (0) USING max(step) GROUP BY run_id", 3),
    ("FROM (SUMMARIZE records) WHERE column_name = 'run_id' AND approx_unique = 3", 1),
    ("FROM (VALUES ('a')) AS v(run_id) SEMI JOIN records USING (run_id)", 1),
]


@pytest.mark.parametrize(("statement", "rows"), ALL)
def test_where_it_is_not_plain_all_runs_are_looked_at(history: History, statement: str, rows: int) -> None:
    history.query("FROM records WHERE run_id = 'a'")
    assert history.query(statement).num_rows == rows


def test_the_correlated_condition_of_another_table_confines_nothing(history: History) -> None:
    sql = "SELECT (SELECT count(*) FROM records AS r WHERE runs.run_id = 'a') AS n FROM runs WHERE run_id = 'a'"
    assert history.query(sql).to_pylist() == [{"n": 6}]


def test_the_connection_shows_all_runs_whatever_was_asked_before(history: History) -> None:
    history.query("FROM records WHERE run_id = 'a'")
    assert history.connection.execute("SELECT count(DISTINCT run_id) FROM records").fetchall() == [(3,)]


@pytest.mark.parametrize("run_id", ["../a", "nowhere", "", "a/../b", "a'"])
def test_a_run_that_is_not_there_has_no_rows(history: History, run_id: str) -> None:
    assert history.query("FROM records WHERE run_id = ?", [run_id]).num_rows == 0


def test_a_column_that_was_renamed_to_run_id_confines_nothing(history: History) -> None:
    sql = "FROM runs AS renamed(x, y, run_id) WHERE run_id = 'a'"
    assert asked_runs(check_statement(history.connection, sql)) is None
