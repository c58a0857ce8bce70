"""What the views show of a store, through a real DuckDB over real files."""

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eigenwatch.history import History, open_history
from eigenwatch.history.compaction import CompactionConfig, compact
from eigenwatch.schemas import METRIC_NAMES, RECORDS, TABLES, table_folder
from eigenwatch.schemas.parts import is_settled
from eigenwatch.schemas.store import Place, open_store
from eigenwatch.schemas.views import view_statements
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.history.stored import NOT_FINITE, alert, at, record, run, spectrum, write

VIEWS = ("records", "records_raw", "eigenvalues", "eigenvalues_raw", "alerts", "runs")


def rows(store: Path, sql: str) -> list[dict[str, Any]]:
    with open_history(store) as history:
        return history.query(sql).to_pylist()


def seen(store: Path, sql: str) -> list[tuple[Any, ...]]:
    return sorted(tuple(row.values()) for row in rows(store, sql))


def test_a_late_revision_replaces_the_record_and_raw_shows_both(tmp_path: Path) -> None:
    write(tmp_path, "r", "records", record(10, complete=False, written=1), record(10, layer=1, written=1))
    write(tmp_path, "r", "records", record(10, complete=True, written=5))
    assert seen(tmp_path, "SELECT layer, complete FROM records") == [(0, True), (1, True)]
    assert len(rows(tmp_path, "FROM records_raw")) == 3


def test_a_revision_of_fewer_ranks_that_was_written_later_replaces_nothing(tmp_path: Path) -> None:
    write(tmp_path, "r", "records", record(10, ranks_seen=2, written=1))
    write(tmp_path, "r", "records", record(10, complete=False, ranks_seen=1, written=5))
    assert seen(tmp_path, "SELECT ranks_seen, complete FROM records") == [(2, True)]


def test_a_restart_hides_what_it_abandoned_even_where_it_has_not_come_yet(tmp_path: Path) -> None:
    write(tmp_path, "r", "records", *[record(step, written=step) for step in (0, 10, 20, 30)])
    write(tmp_path, "r", "records", record(10, attempt=1, written=100))
    assert seen(tmp_path, "SELECT step, attempt FROM records") == [(0, 0), (10, 1)]


def test_a_restart_hides_the_abandoned_steps_of_every_layer(tmp_path: Path) -> None:
    write(tmp_path, "r", "records", record(10, 0), record(10, 1))
    write(tmp_path, "r", "records", record(10, 0, attempt=1, written=100))
    assert seen(tmp_path, "SELECT layer, attempt FROM records") == [(0, 1)]


def test_a_second_restart_from_an_earlier_step_hides_the_first_one(tmp_path: Path) -> None:
    write(tmp_path, "r", "records", *[record(step, written=step) for step in (0, 10, 20)])
    write(tmp_path, "r", "records", record(20, attempt=1, written=50), record(30, attempt=1, written=60))
    write(tmp_path, "r", "records", record(10, attempt=2, written=70))
    assert seen(tmp_path, "SELECT step, attempt FROM records") == [(0, 0), (10, 2)]


def test_the_newest_attempt_wins_over_a_record_of_the_old_one_written_later(tmp_path: Path) -> None:
    write(tmp_path, "r", "records", record(10, attempt=1, written=5))
    write(tmp_path, "r", "records", record(10, attempt=0, written=99))
    assert seen(tmp_path, "SELECT attempt FROM records") == [(1,)]


def test_a_restart_of_one_run_leaves_the_others_alone(tmp_path: Path) -> None:
    write(tmp_path, "a", "records", record(10), record(10, attempt=1, written=50))
    write(tmp_path, "b", "records", record(10))
    assert seen(tmp_path, "SELECT run_id, attempt FROM records") == [("a", 1), ("b", 0)]


def test_sites_and_experts_are_records_of_their_own(tmp_path: Path) -> None:
    places = [("post", None), ("post", 0), ("post", 1), ("pre", None)]
    write(tmp_path, "r", "records", *[record(0, site=site, expert=expert) for site, expert in places])
    assert len(rows(tmp_path, "FROM records")) == 4


def test_eigenvalues_belong_to_the_visible_revision(tmp_path: Path) -> None:
    for written, values in ((1, [1.0, 0.0]), (5, [2.0, 1.0])):
        write(tmp_path, "r", "records", record(0, written=written))
        write(tmp_path, "r", "eigenvalues", spectrum(0, written=written, eigenvalues=values))
    assert [row["eigenvalues"] for row in rows(tmp_path, "FROM eigenvalues")] == [[2.0, 1.0]]


def test_a_newest_revision_without_eigenvalues_shows_none(tmp_path: Path) -> None:
    write(tmp_path, "r", "records", record(0, written=1), record(0, written=5, **NOT_FINITE))
    write(tmp_path, "r", "eigenvalues", spectrum(0, written=1))
    assert rows(tmp_path, "FROM eigenvalues") == []


def test_a_file_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    for _ in range(2):  # as after a crash between compaction's rename and its clean-up
        write(tmp_path, "r", "records", record(0))
        write(tmp_path, "r", "eigenvalues", spectrum(0))
    assert len(rows(tmp_path, "FROM records")) == len(rows(tmp_path, "FROM eigenvalues")) == 1


STORED = st.lists(
    st.fixed_dictionaries(
        {
            "attempt": st.integers(0, 2),
            "step": st.integers(0, 3),
            "layer": st.integers(0, 1),
            "site": st.sampled_from(["post", "pre"]),
            "expert": st.sampled_from([None, 0, 1]),
        }
    ),
    max_size=25,
)


def visible(stored: Iterable[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """The rule of DESIGN.md in plain Python; rows come in the order in which they were written."""
    first_step: dict[int, int] = {}
    for row in stored:
        first_step[row["attempt"]] = min(row["step"], first_step.get(row["attempt"], row["step"]))
    newest: dict[tuple[Any, ...], int] = {}
    for number, row in enumerate(stored):
        later = [first for attempt, first in first_step.items() if attempt > row["attempt"]]
        if all(row["step"] < first for first in later):
            newest[row["step"], row["layer"], row["site"], row["expert"]] = number
    return sorted((number, *key) for key, number in newest.items())


@settings(max_examples=15, deadline=None)
@given(stored=STORED)
def test_records_and_eigenvalues_show_the_newest_timeline(stored: list[dict[str, Any]]) -> None:
    number = f"(epoch(written_at) - {at(0).timestamp()})::INT"
    with tempfile.TemporaryDirectory() as folder:
        written = [row | {"written_at": at(number)} for number, row in enumerate(stored)]
        write(Path(folder), "r", "records", *[record(**row) for row in written])
        write(Path(folder), "r", "eigenvalues", *[spectrum(**row) for row in written])
        with open_history(folder) as history:
            for view in ("records", "eigenvalues"):
                shown = history.query(f"SELECT {number} AS number, step, layer, site, expert FROM {view}")
                assert sorted(tuple(row.values()) for row in shown.to_pylist()) == visible(stored)


def test_an_alert_is_shown_once_in_its_current_state(tmp_path: Path) -> None:
    write(tmp_path, "r", "alerts", alert("a", 10, written=1), alert("b", 10, written=1))
    write(tmp_path, "r", "alerts", alert("a", 40, written=9, state="resolved"))
    assert seen(tmp_path, "SELECT alert_id, state, step FROM alerts") == [
        ("a", "resolved", 40),
        ("b", "firing", 10),
    ]


def test_an_alert_outlives_the_attempt_that_raised_it(tmp_path: Path) -> None:
    write(tmp_path, "r", "records", record(10), record(0, attempt=1, written=50))
    write(tmp_path, "r", "alerts", alert("a", 10, written=1))
    assert seen(tmp_path, "SELECT alert_id, attempt FROM alerts") == [("a", 0)]


def test_runs_show_each_attempt_in_its_current_state(tmp_path: Path) -> None:
    write(tmp_path, "r", "runs", run(0, written=0), run(0, written=9, status="lost"))
    write(tmp_path, "r", "runs", run(1, written=10, tags={"norm": "pre"}))
    assert seen(tmp_path, "SELECT attempt, status, tags['norm'], layers[1].width FROM runs") == [
        (0, "lost", None, 256),
        (1, "running", "pre", 256),
    ]


@pytest.mark.parametrize("run_id", ["123", "2026-01-01", "1e5", "true", "007", "a.b_c-d", "run_id"])
def test_a_run_id_stays_the_text_it_is(tmp_path: Path, run_id: str) -> None:
    write(tmp_path, run_id, "records", record(0))
    assert rows(tmp_path, f"SELECT run_id, typeof(run_id) AS type FROM records WHERE run_id = '{run_id}'") == [
        {"run_id": run_id, "type": "VARCHAR"}
    ]


def test_an_empty_store_has_empty_views_of_the_same_columns_as_a_full_one(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for table, row in (
        ("records", record(0)),
        ("eigenvalues", spectrum(0)),
        ("alerts", alert("a", 0, written=0)),
        ("runs", run(written=0)),
    ):
        write(tmp_path / "full", "r", table, row)
    with open_history(tmp_path / "empty") as empty, open_history(tmp_path / "full") as full:
        for view in VIEWS:
            nothing, something = empty.query(f"FROM {view}"), full.query(f"FROM {view}")
            assert (nothing.num_rows, something.num_rows) == (0, 1)
            assert nothing.schema == something.schema
            assert nothing.column_names[0] == "run_id"


def test_every_column_of_the_schemas_is_shown_with_its_type(tmp_path: Path) -> None:
    """Such that Arrow out of the store is Arrow as it went in, the run id in front."""
    for table, row in (
        ("records", record(0, **dict.fromkeys(METRIC_NAMES, 0.5))),
        ("eigenvalues", spectrum(0)),
        ("alerts", alert("a", 0, written=0)),
        ("runs", run(written=0, tags={"norm": "pre"}, ended_at=at(3))),
    ):
        write(tmp_path, "r", table, row)
        with open_history(tmp_path) as history:
            result = history.query(f"FROM {table}")
        written = pa.Table.from_pylist([row], schema=TABLES[table])
        assert result.drop_columns("run_id").cast(written.schema).equals(written)


def test_a_file_of_an_older_version_shows_null_where_it_lacks_a_column(tmp_path: Path) -> None:
    folder = table_folder(tmp_path, "old", "records")
    folder.mkdir(parents=True)
    older = pa.Table.from_pylist([record(0)], schema=RECORDS).drop_columns(["js_divergence", "soft_rank"])
    pq.write_table(older, folder / "part-0.parquet")
    write(tmp_path, "new", "records", record(0, soft_rank=80.0))
    assert seen(tmp_path, "SELECT run_id, soft_rank FROM records") == [("new", 80.0), ("old", None)]


@pytest.mark.parametrize(
    "name",
    [
        "a b",
        "it's",
        'say "hi"',
        "x[1]",
        "[a-z]",
        "st*r",
        "wh?t",
        "{a,b}",
        "a;b",
        "$records",
        "layer=3",
        "run_id=x",
        "ü",
        "%20",
    ],
)
def test_any_path_may_hold_a_store(tmp_path: Path, name: str) -> None:
    store = tmp_path / name
    write(store, "r", "records", record(0, layer=7))
    write(tmp_path / "a", "neighbour", "records", record(0))
    assert seen(store, "SELECT run_id, layer FROM records") == [("r", 7)]


def test_a_path_that_duckdb_cannot_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="backslash"):
        view_statements({"records": [str(tmp_path / "a\\b" / "part-0.parquet")]})


def test_the_statements_work_in_any_duckdb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "store", "r", "records", record(0))
    monkeypatch.chdir(tmp_path)
    with open_history("store") as history:
        statements = history.views
    monkeypatch.chdir("/")
    with duckdb.connect() as shell:
        shell.execute(";\n".join(statements))
        assert shell.sql("SELECT run_id, step FROM records").fetchall() == [("r", 0)]


@pytest.fixture(scope="module")
def six_runs(tmp_path_factory: pytest.TempPathFactory):
    store = tmp_path_factory.mktemp("six_runs")
    for number in range(6):
        write(store, f"r{number}", "records", record(0))
        write(store, f"r{number}", "eigenvalues", spectrum(0))
        write(store, f"r{number}", "alerts", alert("a", 0, written=0))
        write(store, f"r{number}", "runs", run(written=0))
    with open_history(store) as history:
        yield history


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("where", ["run_id = 'r3'", "run_id = 'r3' AND layer = 0", "run_id IN ('r3')"])
def test_a_question_about_one_run_opens_no_file_of_another(six_runs: History, view: str, where: str) -> None:
    """In any DuckDB with the views over all runs; `query` would not even name it the others (see test_asked)."""
    if view == "eigenvalues" and "IN" in where:
        pytest.skip("DuckDB carries = through a join, IN only to the side that it is about")
    if view == "runs":
        where = where.replace("layer", "attempt")
    plan = six_runs.connection.sql(f"EXPLAIN ANALYZE FROM {view} WHERE {where}").fetchall()[0][1]
    scanned = re.findall(r"Scanning Files: (\d+)/(\d+)", plan)
    assert scanned == [("1", "6")] * plan.count("READ_PARQUET")


SETTLED_CASES = {
    "one attempt, each record once": ([record(0), record(10), record(0, 1), record(0, site="pre")], True),
    "experts": ([record(0, expert=0), record(0, expert=1), record(0)], True),
    "a revision": ([record(0, complete=False), record(0, written=5)], False),
    "a restart": ([record(0), record(10), record(10, attempt=1, written=50)], False),
}


@pytest.mark.parametrize(("stored", "settled"), SETTLED_CASES.values(), ids=list(SETTLED_CASES))
def test_a_compacted_run_with_nothing_to_hide_is_shown_as_it_is(
    tmp_path: Path, stored: list[dict[str, Any]], settled: bool
) -> None:
    for row in stored:
        write(tmp_path, "r", "records", row)
    write(tmp_path, "live", "records", record(0), record(0, written=5))
    before = seen(tmp_path, "SELECT run_id, attempt, step, layer, site, written_at FROM records")
    compact(open_store(tmp_path), CompactionConfig())
    (name,) = open_store(tmp_path).live("r")[Place("r", "records")]
    assert is_settled(name) is settled
    assert seen(tmp_path, "SELECT run_id, attempt, step, layer, site, written_at FROM records") == before
    write(tmp_path, "r", "records", record(0, attempt=2, written=99))
    assert seen(tmp_path, "SELECT run_id, attempt, step FROM records") == [("live", 0, 0), ("r", 2, 0)]
