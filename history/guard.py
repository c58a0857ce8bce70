"""The guard: which SQL statements may run over the history. One statement, and it only reads.

DuckDB's own settings keep a session inside the store's folder (see `session`), but inside it they still allow
COPY … TO, and the type of a statement does not tell: EXPLAIN ANALYZE runs what it explains, and in DuckDB 2.0
`WITH a AS (COPY … TO …) FROM a` is a SELECT. So the parsed statement is walked, against lists of the allowed.
"""

import contextlib
import json
import re
import threading
from collections.abc import Iterator

import duckdb

from ..schemas.views import table_macros
from .asked import VIEWLESS, Parsed, parts

READING_NODES = frozenset({"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"})
TABLE_FUNCTIONS = VIEWLESS | {"duckdb_columns", "duckdb_views", "histogram", "histogram_values"} | table_macros()
"""What may stand in FROM with parentheses. Others read files, change settings or run SQL out of a string."""

_ALLOWED = "only SELECT, FROM, WITH, VALUES, DESCRIBE, SUMMARIZE, SHOW and EXPLAIN of these are allowed"
_EXPLAIN = re.compile(r"\s*EXPLAIN\b\s*(ANALYZE\b\s*)?(\(\s*(FORMAT|ANALYZE)\b[^()]*\))?", re.IGNORECASE)


INTERRUPT_AGAIN_SECONDS = 0.2


@contextlib.contextmanager
def time_limit(connection: duckdb.DuckDBPyConnection, seconds: float | None) -> Iterator[None]:
    """Interrupts what runs on the connection when the time is over, from a thread that ends with the block.

    Raises:
        ValueError: it was interrupted so.
    """
    if seconds is None:
        yield
        return
    done, over = threading.Event(), threading.Event()

    def interrupt() -> None:
        wait: float = seconds
        while not done.wait(wait):
            over.set()
            connection.interrupt()
            wait = INTERRUPT_AGAIN_SECONDS  # it may have come between two statements

    watcher = threading.Thread(target=interrupt, name="eigenwatch-time-limit", daemon=True)
    watcher.start()
    try:
        yield
    except duckdb.InterruptException:
        if not over.is_set():
            raise
        raise ValueError(
            f"stopped after {seconds:g} seconds: ask about fewer runs or rows, compact the store, or raise --timeout "
            "(timeout_seconds)"
        ) from None
    finally:
        done.set()
        watcher.join()


def check_statement(connection: duckdb.DuckDBPyConnection, sql: str) -> Parsed:
    """Passes one statement that only reads.

    Returns:
        What DuckDB has parsed, of the statement that an EXPLAIN explains.

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
    parsed = _parsed(connection, sql)
    for part in parts(parsed):
        _check_part(part)
    return parsed


def _parsed(connection: duckdb.DuckDBPyConnection, sql: str) -> Parsed:
    # fetchall, not fetchone: an unfinished result blocks the connection.
    rows = connection.execute("SELECT json_serialize_sql($1::VARCHAR)", [sql]).fetchall()
    try:
        parsed = json.loads(rows[0][0])
    except RecursionError:
        raise ValueError("the statement nests too deeply to be checked: use BETWEEN, IN or a list") from None
    if parsed["error"]:
        raise ValueError(f"the statement is refused: {_ALLOWED}")
    (statement,) = parsed["statements"]
    return dict(statement)


def _check_part(part: Parsed) -> None:
    kind = part.get("type")
    if not isinstance(kind, str):
        return
    if kind.endswith("_NODE") and kind not in READING_NODES:
        statement = kind.removesuffix("_NODE").removesuffix("_QUERY")
        raise ValueError(f"{statement} inside a query is refused: {_ALLOWED}")
    if kind == "TABLE_FUNCTION":
        name = part["function"]["function_name"].lower()
        if name not in TABLE_FUNCTIONS:
            raise ValueError(f"the table function {name}() is refused: query the views and macros, see --help")
