"""`eigenwatch query`, as a shell sees it."""

import csv
import io
import json
import os
import pty
import re
import resource
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from eigenwatch.cli.query import query
from eigenwatch.schemas import EIGENVALUES, RECORDS, RUNS, STORE_VARIABLE, table_folder

COMMAND = [
    sys.executable,
    "-c",
    "from eigenwatch.cli.query import query; query(prog_name='eigenwatch query')",
]
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def write(store: Path, table: str, schema: pa.Schema, *rows: dict[str, Any]) -> None:
    folder = table_folder(store, "llama", table)
    folder.mkdir(parents=True)
    blank = {pa.string(): "", pa.bool_(): True, pa.timestamp("us", tz="UTC"): NOON}
    required = {field.name: blank.get(field.type, 0) for field in schema if not field.nullable}
    pq.write_table(pa.Table.from_pylist([required | row for row in rows], schema=schema), folder / "part-0.parquet")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write(
        tmp_path,
        "records",
        RECORDS,
        {"step": 10, "layer": 0, "hard_rank": 12.345678, "soft_rank": 123456.789, "written_at": NOON},
        {"step": 10, "layer": 1, "finite": False},
    )
    write(
        tmp_path,
        "eigenvalues",
        EIGENVALUES,
        {"step": 10, "layer": 0, "eigenvalues": [4.0, 3.0, 2.0, 1.0, 0.5]},
    )
    write(tmp_path, "runs", RUNS, {"layers": [], "tags": {"norm": "pre"}})
    return tmp_path


@pytest.fixture
def ask(store: Path):
    def ask(*arguments: str, **options: Any) -> Result:
        return CliRunner().invoke(query, ["--store", str(store), *arguments], **options)

    return ask


def lines(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    return [line.rstrip() for line in result.stdout.splitlines()]


def test_a_table_for_people(ask) -> None:
    header, rule, first, second, count = lines(
        ask("SELECT layer, hard_rank, soft_rank, finite, written_at FROM records ORDER BY layer")
    )
    assert header.split() == ["layer", "hard_rank", "soft_rank", "finite", "written_at"]
    assert set(rule) == {"─"}
    assert first.split() == ["0", "12.35", "123457", "true", "2026-01-01", "12:00:00Z"]
    assert second.split()[:4] == ["1", "null", "null", "false"]
    assert count == "2 rows"


def test_long_and_nested_values_are_cut_in_a_table(ask) -> None:
    output = ask("SELECT eigenvalues, repeat('x', 500) AS text, 'a\nb\x1b[31m' AS control FROM eigenvalues").stdout
    assert "[4, 3, 2, 1, … 5 values]" in output
    assert "…" in output.split("values]")[1]
    assert "a b [31m" in output
    assert max(map(len, output.splitlines())) < 120
    assert "{norm: pre}" in ask("SELECT tags FROM runs").stdout


def test_a_long_table_shows_200_rows_and_says_how_many_there_are(ask) -> None:
    output = lines(ask("FROM range(1000)"))
    assert len(output) == 2 + 200 + 1
    assert output[-1].startswith("the first 200 of 1000 rows;")


def test_a_pipe_gets_every_column_and_a_terminal_those_that_fit(store: Path, ask) -> None:
    assert set(RECORDS.names) < set(lines(ask("FROM records"))[0].split())
    main, terminal = pty.openpty()
    environment = os.environ | {"COLUMNS": "60", "TERM": "xterm"}
    arguments = [*COMMAND, "--store", str(store), "FROM records"]
    subprocess.run(arguments, stdout=terminal, stderr=terminal, env=environment, check=True)
    os.close(terminal)
    with os.fdopen(main, "rb") as screen:
        output = re.sub(r"\x1b\[\d+m", "", screen.read1().decode()).splitlines()
    assert max(map(len, output[:-1])) <= 60
    assert output[-1].endswith("columns fit here; name the ones you want in SELECT")


def test_an_empty_store_has_no_rows(tmp_path: Path) -> None:
    result = CliRunner().invoke(query, ["--store", str(tmp_path), "SELECT step FROM records"])
    assert lines(result)[-1] == "0 rows"


def test_explain_is_printed_as_it_is(ask) -> None:
    output = lines(ask("EXPLAIN FROM runs"))
    assert any("READ_PARQUET" in line for line in output)
    assert all(len(line) == len(output[0]) for line in output if line.startswith("│"))


def test_json_is_an_array_of_objects(ask) -> None:
    result = ask("SELECT layer, hard_rank, 'nan'::DOUBLE AS bad, written_at FROM records ORDER BY layer", "--json")
    assert json.loads(result.stdout, parse_constant=pytest.fail) == [
        {"layer": 0, "hard_rank": 12.345678, "bad": None, "written_at": "2026-01-01T12:00:00+00:00"},
        {"layer": 1, "hard_rank": None, "bad": None, "written_at": "2026-01-01T12:00:00+00:00"},
    ]
    assert json.loads(ask("FROM records LIMIT 0", "--json").stdout) == []


def test_json_says_nested_values_sums_and_days(ask) -> None:
    statement = """SELECT tags, {'a': ['inf'::FLOAT, 1.5]} AS nested, sum(2::BIGINT) AS sum,
                   0.5::DECIMAL(4, 1) AS half, DATE '2026-01-01' AS day, 'ü"' AS text
                   FROM runs GROUP BY ALL"""
    (row,) = json.loads(ask(statement, "--json").stdout)
    assert row == {
        "tags": {"norm": "pre"},
        "nested": {"a": [None, 1.5]},
        "sum": 2,
        "half": 0.5,
        "day": "2026-01-01",
        "text": 'ü"',
    }


def test_csv(ask) -> None:
    statement = "SELECT layer, hard_rank, finite, written_at, [1, 2] AS list FROM records ORDER BY layer"
    assert list(csv.reader(io.StringIO(ask(statement, "--csv").stdout))) == [
        ["layer", "hard_rank", "finite", "written_at", "list"],
        ["0", "12.345678", "true", "2026-01-01T12:00:00+00:00", "[1, 2]"],
        ["1", "", "false", "2026-01-01T12:00:00+00:00", "[1, 2]"],
    ]


def test_parquet(ask, tmp_path: Path) -> None:
    result = ask("SELECT step, layer FROM records ORDER BY layer", "--parquet", str(tmp_path / "out.parquet"))
    assert result.exit_code == 0
    assert result.stdout == ""
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == [
        {"step": 10, "layer": 0},
        {"step": 10, "layer": 1},
    ]


def test_sql_from_standard_input(ask) -> None:
    assert json.loads(ask("-", "--json", input="SELECT 42 AS answer;\n").stdout) == [{"answer": 42}]


def test_emitted_sql_runs_in_any_duckdb(ask) -> None:
    script = "\n".join(lines(ask("--emit-sql")))
    with duckdb.connect() as shell:
        shell.execute(script)
        assert shell.sql("SELECT count(*) FROM records").fetchall() == [(2,)]


def test_the_store_comes_from_the_environment(store: Path) -> None:
    result = CliRunner().invoke(
        query, ["SELECT count(*) AS n FROM records", "--json"], env={STORE_VARIABLE: str(store)}
    )
    assert json.loads(result.stdout) == [{"n": 2}]


def test_help_has_an_example(ask) -> None:
    assert 'eigenwatch query "DESCRIBE records"' in ask("--help").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SELECT hard_rnk FROM records"], 'Candidate bindings: "hard_rank"'),
        (["SELEC 1"], "syntax error"),
        (["COPY records TO 'x.csv'"], "COPY is refused"),
        (["SELECT 1 AS a, 2 AS a", "--json"], "two columns are named 'a'"),
        (
            ["SELECT 1 AS a", "--parquet", "/nowhere/x.parquet"],
            "cannot write /nowhere/x.parquet: No such file",
        ),
        (["SELECT 1", "--store", "/nowhere"], "no store at /nowhere: pass --store"),
    ],
)
def test_a_failure_is_one_line_and_status_1(ask, arguments: list[str], message: str) -> None:
    result = ask(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.mark.parametrize("arguments", [[], ["SELECT 1", "--json", "--csv"], ["SELECT 1", "--emit-sql"], ["--nonsense"]])
def test_wrong_usage_is_status_2(ask, arguments: list[str]) -> None:
    assert ask(*arguments).exit_code == 2


@pytest.mark.parametrize("form", [[], ["--csv"], ["--json"]])
def test_a_reader_that_leaves_early_hears_no_complaint(store: Path, form: list[str]) -> None:
    arguments = [
        *COMMAND,
        "--store",
        str(store),
        f"SELECT repeat('x', 9999) AS {'x' * 40} FROM range(1000)",
        *form,
    ]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""


def test_a_query_that_takes_too_long_fails_in_one_line(ask) -> None:
    result = ask("SELECT count(*) FROM range(1000000000000)", "--timeout", "0.3")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: stopped after 0.3 seconds: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("sql", ["SELECT list_sum(range(2000000000))", "SELECT length(repeat('x', 4200000000)) AS n"])
def test_a_query_that_wants_too_much_memory_fails_in_one_line(ask, sql: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    result = ask(sql)
    assert result.exit_code == 1
    assert "emory" in result.stderr
    assert result.stderr.count("\n") == 1
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
