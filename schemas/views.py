"""The SQL views over the files of a store, `views.sql` with these files filled in, and the macros over the views.

Pure text, for whoever has a DuckDB: `history` runs it, `eigenwatch query --emit-sql` prints it for others.

Each view names the files that count now, from one listing of the store: a statement sees every row once, whatever
compaction does meanwhile, and all the views of a statement see the same rows. Ask for the statements again to see what
was written since.

The column types come from the Arrow schemas, not from the files: a file that an older version wrote shows
null in the columns it lacks, a table without any file is an empty view of the right types, and DuckDB opens
no file but those that the query needs. The run id comes from the file's name as text ("123" and "2026-01-01"
stay what they are), and DuckDB skips the files of other runs when the query asks for one.
"""

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files as resource_files
from string import Template

import pyarrow as pa

from .parts import is_settled
from .tables import TABLES

VIEWS = ("records", "records_raw", "eigenvalues", "eigenvalues_raw", "alerts", "runs")
_TABLE_MACRO = re.compile(r"CREATE OR REPLACE MACRO (\w+)\([^)]*\) AS TABLE\b")

_SQL_TYPES = {
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
    pa.string(): "VARCHAR",
    pa.bool_(): "BOOLEAN",
    pa.timestamp("us", tz="UTC"): "TIMESTAMP WITH TIME ZONE",
}


def view_statements(files: Mapping[str, list[str]]) -> list[str]:
    """The statements that create or replace the views over these files, without closing semicolons.

    Args:
        files: by table, the path or URI of each; a table without any gets an empty view.

    Raises:
        ValueError: a path holds a backslash, which DuckDB takes for a path separator.
    """
    settled, unsettled = _by_run(files.get("records", []))
    sources = {table: _rows(files.get(table, []), schema) for table, schema in TABLES.items()}
    sources |= {"settled": _rows(settled, TABLES["records"]), "unsettled": _rows(unsettled, TABLES["records"])}
    empty = {name for name, rows in (("settled", settled), ("unsettled", unsettled)) if not rows}
    return [Template(_without_empty(view, empty)).substitute(sources) for view in _statements("views.sql")]


def macro_statements() -> list[str]:
    """Those that create or replace the macros, once the views are there."""
    return list(_statements("macros.sql"))


@cache
def table_macros() -> frozenset[str]:
    """The names of the macros that stand in FROM."""
    found = (_TABLE_MACRO.match(statement) for statement in _statements("macros.sql"))
    return frozenset(macro[1] for macro in found if macro)


def glob_literal(path: str) -> str:
    """The pattern that matches this path alone, whatever characters it holds."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in path)


def sql_literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@cache
def _statements(name: str) -> list[str]:
    text = (resource_files(__package__) / name).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("--")]
    return [statement.strip() for statement in "\n".join(lines).split(";") if statement.strip()]


def _without_empty(view: str, empty: set[str]) -> str:
    """A view without those parts of a UNION ALL that would read nothing, if any reads something."""
    head, _, union = view.partition(" AS\n")
    parts = union.split("\nUNION ALL\n")
    reading = [part for part in parts if not any(re.search(rf"\${name}\b", part) for name in empty)]
    return f"{head} AS\n" + "\nUNION ALL\n".join(reading or parts[:1])


def _by_run(records: list[str]) -> tuple[list[str], list[str]]:
    """The files of the runs that are settled, and of the others."""
    by_folder: dict[str, list[str]] = {}
    for file in records:
        by_folder.setdefault(file.rpartition("/")[0], []).append(file)
    settled: list[str] = []
    unsettled: list[str] = []
    for files in by_folder.values():
        (settled if len(files) == 1 and is_settled(files[0]) else unsettled).extend(files)
    return settled, unsettled


def _rows(files: list[str], schema: pa.Schema) -> str:
    """What stands in FROM for these files."""
    if not files:
        return _nothing(schema)
    if "\\" in files[0]:
        raise ValueError(f"DuckDB cannot read a store below a backslash: rename or link the folder of {files[0]}")
    names = ",\n".join(f"      {sql_literal(glob_literal(file))}" for file in files)
    # `schema` rather than hive_partitioning and union_by_name: those read the footer of every file of every
    # run before the first one is skipped, and take a "layer=3" in the path above the store for a column.
    run_id = "substr(split_part(filename, '/', -3), length('run_id=') + 1) AS run_id"
    return (
        f"(\n    SELECT {run_id}, * EXCLUDE (filename)\n"
        f"    FROM read_parquet([\n{names}\n    ], filename = true, schema = {_columns(schema)})\n)"
    )


def _columns(schema: pa.Schema) -> str:
    """The argument `schema` of read_parquet. Cast from a text, which DuckDB binds four times as fast as a MAP of 46
    structs, at every query: that was half the time of a question about one run."""
    columns = ",\n".join(
        f'      {field.name}={{name: {field.name}, type: "{_sql_type(field.type)}", default_value: NULL}}'
        for field in schema
    )
    column = 'STRUCT("name" VARCHAR, "type" VARCHAR, default_value VARCHAR)'
    return f"CAST('{{\n{columns}\n    }}' AS MAP(VARCHAR, {column}))"


def _nothing(schema: pa.Schema) -> str:
    columns = ",\n".join(f'      CAST(NULL AS {_sql_type(field.type)}) AS "{field.name}"' for field in schema)
    run_id = "CAST(NULL AS VARCHAR) AS run_id"
    return f"(\n    SELECT -- no files yet\n      {run_id},\n{columns}\n    WHERE false\n)"


def _sql_type(arrow: pa.DataType) -> str:
    if pa.types.is_list(arrow):
        return f"{_sql_type(arrow.value_type)}[]"
    if pa.types.is_struct(arrow):
        return f"STRUCT({', '.join(f'{field.name} {_sql_type(field.type)}' for field in arrow)})"
    if pa.types.is_map(arrow):
        return f"MAP({_sql_type(arrow.key_type)}, {_sql_type(arrow.item_type)})"
    return _SQL_TYPES[arrow]
