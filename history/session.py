"""The session: a DuckDB that reads one store and nothing else, for SQL typed by anyone.

It lives in memory, on the calling thread, and writes nothing: no database file, no spill file. It may be open
while runs write and while the store is compacted: each query lists the store once, and sees the rows that are
there by then, each of them once.
"""

import os
from types import TracebackType
from typing import Any, Self

import duckdb
import pyarrow as pa

from ..schemas import STORE_VARIABLE, TABLES, default_store
from ..schemas.store import LocalStore, Store, open_store
from ..schemas.views import glob_literal, sql_literal, view_statements
from .guard import check_statement
from .object_files import object_files

MEMORY_LIMIT_BYTES = 2 << 30
THREADS_MAX = 4
"""Both small: the machine may be training."""


_MISSPELT = (duckdb.BinderException, duckdb.CatalogException, duckdb.ParserException)


def open_history(store: str | os.PathLike[str] | None = None) -> "History":
    """The history in a store, ready for SQL over the views `records`, `eigenvalues`, `alerts`, `runs`, ….

    Args:
        store: its folder, or the URI of an object store; `$EIGENWATCH_STORE`, else `./eigenwatch-store`, where not
            given.

    Raises:
        ValueError: there is no such store, it cannot be read, or a newer eigenwatch wrote it.

    Example:
        >>> with open_history("runs/") as history:  # doctest: +SKIP
        ...     table = history.query("SELECT layer, hard_rank FROM records WHERE run_id = ?", ["llama-130m"])
    """
    return History(default_store() if store is None else store)


class History:
    """An open store; `close()` it, or use it in a `with`."""

    def __init__(self, store: str | os.PathLike[str]) -> None:
        self.store = open_store(store)
        if not self.store.exists():
            raise ValueError(
                f"no store at {os.fspath(store)}: pass --store, set {STORE_VARIABLE}, or run `eigenwatch demo`"
            )
        self.views: list[str] = []
        """The definitions of the views, as statements for any other DuckDB."""
        self.connection = _sandbox(self.store)
        """For whatever `query` lacks: it reaches only the store too, but its statements are not checked."""
        self._define_views()

    def query(self, sql: str, parameters: list[Any] | dict[str, Any] | None = None) -> pa.Table:
        """The result of one statement that only reads. Times are UTC.

        Args:
            sql: SELECT, FROM, WITH, VALUES, DESCRIBE, SUMMARIZE, SHOW or EXPLAIN.
            parameters: values for `?` or `$name` in it.

        Raises:
            ValueError: the statement is refused or fails; one line that says why.
        """
        try:
            self._define_views()
            check_statement(self.connection, sql)
            return self.connection.sql(sql, params=parameters).to_arrow_table()
        except duckdb.Error as error:
            raise ValueError(_one_line(error)) from None

    def close(self) -> None:
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _define_views(self) -> None:
        """Again whenever the files that count are others."""
        files: dict[str, list[str]] = {table: [] for table in TABLES}
        for place, names in self.store.live().items():
            files[place.table] += [self.store.address(f"{place.folder}/{name}") for name in names]
        statements = view_statements(files)
        if statements != self.views:
            for statement in statements:
                self.connection.execute(statement)
            self.views = statements


def _sandbox(store: Store) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(":memory:")
    if not isinstance(store, LocalStore):
        connection.register_filesystem(object_files(store))
    # DuckDB compares the patterns in a view with the allowed folders as text, so it stands there as one too.
    folders = ", ".join(sql_literal(f"{folder}/") for folder in {store.uri, glob_literal(store.uri)})
    for setting in (
        "TimeZone = 'UTC'",
        f"memory_limit = '{MEMORY_LIMIT_BYTES >> 20}MiB'",
        f"threads = {min(THREADS_MAX, os.cpu_count() or 1)}",
        "temp_directory = ''",
        "autoinstall_known_extensions = false",
        "autoload_known_extensions = false",
        "enable_progress_bar = false",
        f"allowed_directories = [{folders}]",
        "enable_external_access = false",
        "lock_configuration = true",
    ):
        connection.execute(f"SET {setting}")
    return connection


def _one_line(error: duckdb.Error) -> str:
    """DuckDB's message without the excerpt of the statement that follows it, and what to do about it."""
    message = str(error).split("\nLINE ")[0]
    if message.startswith("Traceback "):  # from our file system for object stores
        message = f"the store cannot be read: {message.strip().splitlines()[-1]}"
    if isinstance(error, duckdb.OutOfMemoryException):
        return f"{message.splitlines()[0]} (ask for fewer rows or columns at once)"
    remedy = ' (columns: eigenwatch query "DESCRIBE records")' if isinstance(error, _MISSPELT) else ""
    return " ".join(message.split()) + remedy
