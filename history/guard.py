"""The guard: which SQL statements may run over the history. One statement, and it only reads.

DuckDB's own settings keep a session inside the store's folder (see `session`), but inside it they still allow
COPY … TO, and the type of a statement does not tell: EXPLAIN ANALYZE runs what it explains, and in DuckDB 2.0
`WITH a AS (COPY … TO …) FROM a` is a SELECT. So the parsed statement is walked, against lists of the allowed.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import duckdb

READING_NODES = frozenset({"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"})
TABLE_FUNCTIONS = frozenset(
    {
        "duckdb_columns",
        "duckdb_functions",
        "duckdb_settings",
        "duckdb_views",
        "generate_series",
        "histogram",
        "histogram_values",
        "json_each",
        "json_tree",
        "range",
        "unnest",
    }
)
"""What may stand in FROM with parentheses. Others read files, change settings or run SQL out of a string."""

_ALLOWED = "only SELECT, FROM, WITH, VALUES, DESCRIBE, SUMMARIZE, SHOW and EXPLAIN of these are allowed"
_EXPLAIN = re.compile(r"\s*EXPLAIN\b\s*(ANALYZE\b\s*)?(\(\s*(FORMAT|ANALYZE)\b[^()]*\))?", re.IGNORECASE)


def check_statement(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Passes one statement that only reads.

    Raises:
        ValueError: it is anything else; the message says what.
        duckdb.Error: it does not parse.
    """
    statements = connection.extract_statements(sql)
    if len(statements) != 1:
        found = f"{len(statements)} statements" if statements else "no SQL statement"
        raise ValueError(f"one statement at a time, got {found}")
    kind = statements[0].type
    if kind == duckdb.StatementType.MULTI:
        raise ValueError("a PIVOT must name its values here: PIVOT … ON column IN (…)")
    if kind == duckdb.StatementType.EXPLAIN:
        prefix = _EXPLAIN.match(sql)
        if prefix is None:
            raise ValueError("EXPLAIN must be the first word of the statement")
        sql = sql[prefix.end() :]
    elif kind != duckdb.StatementType.SELECT:
        raise ValueError(f"{kind.name} is refused: {_ALLOWED}")
    for part in _parts(_parsed(connection, sql)):
        _check_part(part)


def _parsed(connection: duckdb.DuckDBPyConnection, sql: str) -> Any:
    # fetchall, not fetchone: an unfinished result blocks the connection.
    rows = connection.execute("SELECT json_serialize_sql($1::VARCHAR)", [sql]).fetchall()
    try:
        parsed = json.loads(rows[0][0])
    except RecursionError:
        raise ValueError("the statement nests too deeply to be checked: use BETWEEN, IN or a list") from None
    if parsed["error"]:
        raise ValueError(f"the statement is refused: {_ALLOWED}")
    return parsed["statements"]


def _parts(node: Any) -> Iterator[dict[str, Any]]:
    """Every object of the parsed statement. A loop, since expressions nest deeply."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)


def _check_part(part: dict[str, Any]) -> None:
    kind = part.get("type")
    if not isinstance(kind, str):
        return
    if kind.endswith("_NODE") and kind not in READING_NODES:
        statement = kind.removesuffix("_NODE").removesuffix("_QUERY")
        raise ValueError(f"{statement} inside a query is refused: {_ALLOWED}")
    if kind == "TABLE_FUNCTION":
        name = part["function"]["function_name"].lower()
        if name not in TABLE_FUNCTIONS:
            raise ValueError(f"the table function {name}() is refused: query the views, see SHOW TABLES")
