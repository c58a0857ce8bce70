"""The session: a DuckDB that reads one history and nothing else, for SQL typed by anyone.

It lives in memory, on the calling thread, and writes nothing: no database file, no spill file. It may be open
while runs write and while the store is compacted: each query lists the runs that it asks about once (`asked`), and sees
the rows that are there by then, each of them once.
"""

import os
from types import TracebackType
from typing import Any, Self

import duckdb
import pyarrow as pa

from ..schemas import STORE_VARIABLE, TABLES, default_store
from ..schemas.store import LocalStore, Store, stores_at
from ..schemas.views import glob_literal, macro_statements, sql_literal, view_statements
from .asked import asked_runs
from .guard import check_statement, time_limit
from .object_files import object_files

MEMORY_LIMIT_BYTES = 2 << 30
THREADS_MAX = 4
"""Both small: the machine may be training."""
FEWER = "(ask for fewer rows or columns at once)"

_MISSPELT = (duckdb.BinderException, duckdb.CatalogException, duckdb.ParserException)


def open_history(store: str | os.PathLike[str] | None = None, *, timeout_seconds: float | None = None) -> "History":
    """The history in a store, ready for SQL over the views `records`, `eigenvalues`, `alerts`, `runs`, ….

    Args:
        store: its folder, a pattern such as `teams/*/runs` for several folders as one history, or the URI of an object
            store; `$EIGENWATCH_STORE`, else `./eigenwatch-store`, where not given.
        timeout_seconds: how long one query may take; no limit where None.

    Raises:
        ValueError: there is no such store, or it cannot be read.

    Example:
        >>> with open_history("runs/") as history:  # doctest: +SKIP
        ...     table = history.query("SELECT layer, hard_rank FROM records WHERE run_id = ?", ["llama-130m"])
    """
    return History(default_store() if store is None else store, timeout_seconds=timeout_seconds)


class History:
    """One or several open stores; `close()` it, or use it in a `with`."""

    def __init__(self, store: str | os.PathLike[str], *, timeout_seconds: float | None = None) -> None:
        if timeout_seconds is not None and timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds must be positive, got {timeout_seconds:g}")
        self.stores = stores_at(store)
        if not self.stores or not self.stores[0].exists():
            raise ValueError(
                f"no store at {os.fspath(store)}: pass --store, set {STORE_VARIABLE}, or run `eigenwatch demo`"
            )
        self._connection = _sandbox(self.stores)
        self._timeout_seconds = timeout_seconds
        self._shown: dict[str, list[str]] | None = None
        """The files that the views name now."""
        self._has_macros = False

    @property
    def connection(self) -> duckdb.DuckDBPyConnection:
        """For whatever `query` lacks: it reaches only the store too, but its statements are not checked.

        The views are as of this moment, and of the next query then: ask for it again to see what came since.
        """
        self._define(None)
        return self._connection

    @property
    def views(self) -> list[str]:
        """What defines the views over the files as they are now, and the macros, for any other DuckDB."""
        return view_statements(self._files(None)) + macro_statements()

    def query(self, sql: str, parameters: list[Any] | dict[str, Any] | None = None) -> pa.Table:
        """The result of one statement that only reads. Times are UTC.

        Args:
            sql: SELECT, FROM, WITH, VALUES, DESCRIBE, SUMMARIZE, SHOW or EXPLAIN.
            parameters: values for `?` or `$name` in it.

        Raises:
            ValueError: the statement is refused or fails, takes too long or too much, or a newer eigenwatch wrote what
                it asks for; one line that says why.
        """
        try:
            with time_limit(self._connection, self._timeout_seconds):
                statement = check_statement(self._connection, sql)
                self._define(asked_runs(statement, parameters))
                return self._connection.sql(sql, params=parameters).to_arrow_table()
        except duckdb.Error as error:
            raise ValueError(_one_line(error)) from None
        except MemoryError as error:  # pyarrow's own among them
            raise ValueError(f"out of memory: {str(error).strip()} {FEWER}") from None

    def pandas(self, sql: str, parameters: list[Any] | dict[str, Any] | None = None) -> Any:
        """The same as a pandas DataFrame; pandas must be installed."""
        return self.query(sql, parameters).to_pandas()

    def polars(self, sql: str, parameters: list[Any] | dict[str, Any] | None = None) -> Any:
        """The same as a polars DataFrame; `pip install 'eigenwatch[polars]'`."""
        import polars

        return polars.from_arrow(self.query(sql, parameters))

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _define(self, runs: frozenset[str] | None) -> None:
        """The views over the files of these runs, or all; again whenever the files that count are others."""
        files = self._files(runs)
        if files != self._shown:
            self._shown = None
            for statement in view_statements(files):
                self._connection.execute(statement)
            self._shown = files
        if not self._has_macros:
            for statement in macro_statements():
                self._connection.execute(statement)
            self._has_macros = True

    def _files(self, runs: frozenset[str] | None) -> dict[str, list[str]]:
        files: dict[str, list[str]] = {table: [] for table in TABLES}
        owners: dict[str, Store] = {}
        for store in self.stores:
            for run in [None] if runs is None else sorted(runs):
                for place, names in store.live(run).items():
                    owner = owners.setdefault(place.run_id, store)
                    if owner is not store:
                        raise ValueError(
                            f"run {place.run_id!r} is in {owner.uri} and in {store.uri}: a run id names one run, so "
                            "open one of these stores alone, or rename the folder of one of the runs"
                        )
                    files[place.table] += [store.address(f"{place.folder}/{name}") for name in names]
        return files


def _sandbox(stores: list[Store]) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(":memory:")
    if not isinstance(stores[0], LocalStore):
        connection.register_filesystem(object_files(stores[0]))
    # DuckDB compares the patterns in a view with the allowed folders as text, so it stands there as one too.
    names = {name for store in stores for name in (store.uri, glob_literal(store.uri))}
    folders = ", ".join(sql_literal(f"{folder}/") for folder in sorted(names))
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
        return f"{message.splitlines()[0]} {FEWER}"
    remedy = ' (columns: eigenwatch query "DESCRIBE records")' if isinstance(error, _MISSPELT) else ""
    return " ".join(message.split()) + remedy
