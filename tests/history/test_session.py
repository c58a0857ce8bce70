"""A session reads one store, and nothing else, whatever it is asked."""

from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from eigenwatch.history import History, open_history
from eigenwatch.schemas import STORE_VARIABLE

from tests.history.stored import at, record, spectrum, write


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("session")
    write(folder / "store", "r", "records", record(0, hard_rank=20.0), record(10, hard_rank=30.0))
    (folder / "secret.csv").write_text("password\nswordfish\n")
    return folder / "store"


@pytest.fixture(scope="module")
def history(store: Path):
    with open_history(store) as history:
        yield history


def test_a_result_is_an_arrow_table(history: History) -> None:
    table = history.query("SELECT step, hard_rank FROM records ORDER BY step")
    assert isinstance(table, pa.Table)
    assert table.to_pylist() == [{"step": 0, "hard_rank": 20.0}, {"step": 10, "hard_rank": 30.0}]


def test_a_result_may_be_a_frame_of_pandas_or_polars(history: History) -> None:
    sql = "SELECT run_id, step, hard_rank, written_at FROM records WHERE step >= ? ORDER BY step"
    for frame in (history.pandas(sql, [5]), history.polars(sql, [5])):
        assert frame.shape == (1, 4)
        assert list(frame["hard_rank"]) == [30.0]
        assert list(frame["run_id"]) == ["r"]


def test_parameters_stand_for_values(history: History) -> None:
    assert history.query("SELECT hard_rank FROM records WHERE step = ?", [10]).to_pylist() == [{"hard_rank": 30.0}]
    by_name = history.query("SELECT step FROM records WHERE run_id = $run AND step > $after", {"run": "r", "after": 5})
    assert by_name.to_pylist() == [{"step": 10}]


def test_times_are_utc(history: History) -> None:
    table = history.query("SELECT written_at, written_at::VARCHAR AS text FROM records WHERE step = 10")
    assert table.schema.field("written_at").type == pa.timestamp("us", tz="UTC")
    assert table.to_pylist() == [{"written_at": at(10), "text": "2026-01-01 12:00:10+00"}]


def test_a_session_opened_before_the_first_record_sees_it_come(tmp_path: Path) -> None:
    with open_history(tmp_path) as history:
        assert history.query("FROM records").num_rows == 0
        write(tmp_path, "r", "records", record(0))
        assert history.query("FROM records").num_rows == 1
        write(tmp_path, "r", "records", record(10))
        write(tmp_path, "late", "records", record(0))
        write(tmp_path, "late", "eigenvalues", spectrum(0))
        assert history.query("FROM records").num_rows == 3
        assert history.query("FROM eigenvalues").num_rows == 1


def test_a_file_that_is_still_being_written_is_not_read(store: Path, history: History) -> None:
    (store / "run_id=r" / "records" / ".part-9.parquet.tmp").write_bytes(b"PAR1 half a fi")
    assert history.query("FROM records").num_rows == 2


def test_a_store_that_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no store at .*/nowhere: pass --store, set EIGENWATCH_STORE, or run"):
        open_history(tmp_path / "nowhere")


def test_the_store_comes_from_the_environment_where_none_is_given(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STORE_VARIABLE, str(store))
    with open_history() as history:
        assert history.query("FROM records").num_rows == 2


@pytest.fixture
def teams(tmp_path: Path) -> Path:
    for team, run_id in (("red", "a"), ("red", "b"), ("blue", "c")):
        write(tmp_path / team / "runs", run_id, "records", record(0))
    (tmp_path / "notes").write_text("a file")
    return tmp_path


def test_a_pattern_opens_several_stores_as_one_history(teams: Path) -> None:
    with open_history(f"{teams}/*/runs") as history:
        assert history.query("SELECT run_id FROM records ORDER BY run_id")["run_id"].to_pylist() == ["a", "b", "c"]
        assert history.query("FROM records WHERE run_id = 'c'").num_rows == 1
        write(teams / "blue" / "runs", "c", "records", record(10))
        assert history.query("FROM records WHERE run_id = 'c'").num_rows == 2
        with pytest.raises(ValueError, match="refused"):
            history.query(f"FROM read_text('{teams}/notes')")


def test_a_run_id_that_two_stores_have_is_refused_by_name(teams: Path) -> None:
    write(teams / "blue" / "runs", "a", "records", record(0))
    with open_history(f"{teams}/*/runs") as history:
        with pytest.raises(ValueError, match=r"\Arun 'a' is in \S*/blue/runs and in \S*/red/runs: [^\n]*open one"):
            history.query("FROM records")
        assert history.query("FROM records WHERE run_id = 'c'").num_rows == 1


def test_a_pattern_that_fits_nothing_says_so(teams: Path) -> None:
    with pytest.raises(ValueError, match=r"no store at .*/\*/nothing: pass --store"):
        open_history(f"{teams}/*/nothing")
    with pytest.raises(ValueError, match="an object store takes no pattern"):
        open_history("s3://bucket/*/runs")


def test_a_store_may_be_reached_by_a_link(store: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(store)
    with open_history(tmp_path / "link") as history:
        assert history.query("FROM records").num_rows == 2


@pytest.mark.parametrize(
    "statement",
    [
        "FROM records",
        "TABLE records",
        "VALUES (1)",
        "WITH late AS (FROM records WHERE step > 5) SELECT count(*) FROM late",
        "WITH RECURSIVE n AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM n WHERE i < 3) FROM n",
        "SELECT layer FROM records UNION BY NAME SELECT layer FROM eigenvalues",
        "SELECT unnest([1, 2])",
        "FROM range(3)",
        "FROM histogram(records, hard_rank)",
        "FROM layer_summary('r')",
        "SELECT renyi_rank([2.0, 1.0], 2)",
        "PIVOT records ON layer IN (0, 1) USING max(hard_rank) GROUP BY step",
        "DESCRIBE records",
        "SUMMARIZE records",
        "SHOW TABLES",
        "EXPLAIN FROM records",
        "EXPLAIN ANALYZE FROM records",
        "EXPLAIN (FORMAT json) FROM records",
        "EXPLAIN (SELECT 1)",
        "FROM information_schema.columns",
        "-- a comment\nSELECT 1; -- and another",
        "SELECT " + " + ".join(["1"] * 200),
    ],
)
def test_what_reads_the_store_is_answered(history: History, statement: str) -> None:
    assert history.query(statement).num_rows > 0


HOSTILE = [
    "FROM read_csv('{outside}/secret.csv')",
    "FROM read_text('{outside}/secret.csv')",
    "FROM read_blob('{store}/../secret.csv')",
    "FROM read_json('{outside}/*')",
    "FROM '{outside}/secret.csv'",
    "FROM '{outside}/*.csv'",
    "FROM '{store}/../secret.csv'",
    "FROM glob('/etc/*')",
    "FROM read_parquet('https://example.com/x.parquet')",
    "SUMMARIZE '{outside}/secret.csv'",
    "SELECT (SELECT content FROM read_text('{outside}/secret.csv'))",
    "FROM query('FROM records')",
    "FROM query_table('records')",
    "FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))",
    "FROM parquet_metadata('{outside}/secret.csv')",
    "FROM sniff_csv('{outside}/secret.csv')",
    "FROM duckdb_secrets()",
    "FROM which_secret('s3://bucket', 's3')",
    "SELECT getenv('HOME')",
    "SELECT * FROM layer_summary('r'), read_text('{outside}/secret.csv')",
    "FROM layer_summary((SELECT content FROM read_text('{outside}/secret.csv')))",
    "FROM layer_summary('r'); DROP MACRO TABLE layer_summary",
    "CREATE OR REPLACE MACRO layer_summary(run) AS TABLE FROM records",
    "DROP MACRO TABLE layer_summary",
    "UPDATE records SET step = 0",
    "VACUUM",
    "ANALYZE",
    "USE main",
    "EXECUTE p",
    "IMPORT DATABASE '{outside}'",
    "SET VARIABLE x = 1",
    "PRAGMA enable_profiling",
    "CREATE SECRET (TYPE s3)",
    "CREATE TEMP TABLE t AS SELECT 1",
    "FROM enable_logging(storage = 'file', storage_config = {{'path': '{store}/log'}})",
    "FROM python_variable",
    "COPY records TO '{outside}/out.csv'",
    "COPY records TO '{store}/out.csv'",
    "WITH a AS (COPY (SELECT 1) TO '{store}/out.csv') FROM a",
    "SELECT 1 FROM (WITH a AS (COPY (SELECT 1) TO '{store}/out.csv') FROM a)",
    "EXPLAIN ANALYZE COPY records TO '{store}/out.csv'",
    "EXPLAIN (ANALYZE) COPY records TO '{store}/out.csv'",
    "EXPLAIN ANALYZE WITH a AS (COPY (SELECT 1) TO '{store}/out.csv') FROM a",
    "/* */ EXPLAIN ANALYZE COPY records TO '{store}/out.csv'",
    "EXPORT DATABASE '{store}/out'",
    "ATTACH '{outside}/out.db'",
    "ATTACH '{store}/out.db'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET memory_limit = '100GB'",
    "SET enable_external_access = true",
    "RESET lock_configuration",
    "PRAGMA database_list",
    "CALL pragma_version()",
    "CREATE TABLE t AS SELECT 1",
    "CREATE OR REPLACE VIEW records AS SELECT 1",
    "CREATE MACRO f() AS TABLE SELECT 1",
    "DROP VIEW records",
    "INSERT INTO records SELECT * FROM records",
    "DELETE FROM records",
    "PREPARE p AS SELECT 1",
    "CHECKPOINT",
    "BEGIN",
    "SELECT 1; SELECT 2",
    "SELECT 1; COPY records TO '{store}/out.csv'",
    "",
    "-- nothing",
]


@pytest.mark.parametrize("statement", HOSTILE)
def test_what_does_more_is_refused_in_one_line(store: Path, history: History, statement: str) -> None:
    python_variable = pa.table({"found": ["it"]})
    assert python_variable.num_rows
    before = sorted(store.parent.rglob("*"))
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as refusal:
        history.query(statement.format(store=store, outside=store.parent))
    assert "swordfish" not in str(refusal.value)
    assert sorted(store.parent.rglob("*")) == before
    assert history.query("SELECT count(*) AS n FROM records").to_pylist() == [{"n": 2}]


@pytest.mark.parametrize(
    "statement",
    [
        "FROM read_csv('{outside}/secret.csv')",
        "COPY (SELECT 1) TO '{outside}/out.csv'",
        "ATTACH '{outside}/out.db'",
        "LOAD httpfs",
        "SET allowed_directories = ['/']",
        "SET memory_limit = '100GB'",
        "FROM python_variable",
    ],
)
def test_the_connection_itself_reaches_no_further_than_the_store(store: Path, history: History, statement: str) -> None:
    python_variable = pa.table({"found": ["it"]})
    assert python_variable.num_rows
    with pytest.raises(duckdb.Error):
        history.connection.execute(statement.format(outside=store.parent)).fetchall()


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("SELEC 1", 'syntax error at or near "SELEC"'),
        ("SELECT hard_rnk FROM records", 'Candidate bindings: "hard_rank"'),
        ("FROM recordz", 'Did you mean "records"'),
        ("SELECT 'x'::INTEGER", "Could not convert string 'x'"),
        ("SELECT ?", "parameters"),
        ("SELECT " + " + ".join(["1"] * 900), "nests too deeply"),
        ("PIVOT records ON layer USING max(hard_rank)", "PIVOT … ON column IN"),
    ],
)
def test_a_broken_statement_says_what_is_wrong_in_one_line(history: History, statement: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        history.query(statement)
    assert message in str(error.value)


def test_a_misspelt_column_says_where_the_columns_are(history: History) -> None:
    with pytest.raises(ValueError, match='eigenwatch query "DESCRIBE records"'):
        history.query("SELECT hard_rnk FROM records")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, "r", "records", record(0)).with_name("part-bad.parquet").write_bytes(b"not parquet at all")
    with (
        open_history(tmp_path) as history,
        pytest.raises(ValueError, match=r"\A[^\n]*part-bad\.parquet[^\n]*\Z"),
    ):
        history.query("FROM records")
