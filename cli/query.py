"""`eigenwatch query`: one SQL statement over the history, as a table for people, or JSON, CSV, Parquet."""

import contextlib
import csv
import json
import math
import os
import resource
import sys
import threading
from collections.abc import Iterator
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..history import open_history

ROWS_SHOWN = 200
CELL_CHARACTERS = 48
LIST_ITEMS_SHOWN = 4
BETWEEN_COLUMNS = 3
MEMORY_BYTES = 3 << 30
"""Of a query and its result: DuckDB's own limit, and a third for what that does not count."""
GRACE_SECONDS = 10.0
"""How long after its time a query that is interrupted may take to stop."""
NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)

EPILOG = """
\b
Views:
  records      one row per step, layer, site and expert: ranks, utilizations, data quality
  records_raw  the same with all attempts and revisions
  eigenvalues  the spectrum of each record
  alerts       each alert in its current state
  runs         each attempt of each run
\b
Macros, in FROM (columns and examples: docs/sql.md):
  layer_summary('RUN')          middle, quartiles, last value and trend of each layer
  compare('RUN', 'RUN')         two runs side by side, by step
  width_law(['RUN', …])         how ranks grow with the width: beta, 95 % interval, R²; utilization_law
  spectrum('RUN', LAYER, STEP)  one row an eigenvalue
  alert_evidence('ALERT')       the records and spectra behind an alert
  recompute(['RUN', …])         spectra as shares p, for a metric of your own; renyi_rank(p, order)
\b
Examples:
  eigenwatch query "DESCRIBE records"
  eigenwatch query "SELECT layer, median(effective_dimension) FROM records
                    WHERE run_id = 'llama-130m' AND step > 5000 GROUP BY layer ORDER BY layer"
  eigenwatch query "FROM layer_summary('llama-130m') WHERE metric = 'hard_rank'"
  eigenwatch query "FROM alerts WHERE state = 'firing'" --json
  eigenwatch query --emit-sql > views.sql && duckdb -init views.sql
"""


@click.command("query", epilog=EPILOG)
@click.argument("sql", required=False)
@click.option(
    "--store",
    metavar="STORE",
    help="Folder, 'PATTERN' of folders, or s3://BUCKET/PREFIX.  [$EIGENWATCH_STORE, ./eigenwatch-store]",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array of objects.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@click.option("--parquet", type=click.Path(dir_okay=False), help="Write a Parquet file instead of printing.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="Stop a query that takes longer.",
)
@click.option(
    "--emit-sql",
    is_flag=True,
    help="Print the views over the files as they are now, and the macros, for a DuckDB shell.",
)
def query(
    sql: str | None,
    store: str | None,
    as_json: bool,
    as_csv: bool,
    parquet: str | None,
    timeout: float,
    emit_sql: bool,
) -> None:
    """Run one SQL statement over the store; it can only read. SQL of - is read from standard input."""
    if emit_sql + as_json + as_csv + (parquet is not None) > 1:
        raise click.UsageError("choose one of --json, --csv, --parquet and --emit-sql")
    if emit_sql == (sql is not None):
        raise click.UsageError(
            "--emit-sql takes no SQL" if emit_sql else 'give an SQL statement, such as "DESCRIBE records"'
        )
    try:
        with open_history(store, timeout_seconds=timeout) as history, _limits(timeout):
            if sql is None:
                click.echo(";\n\n".join(history.views) + ";")
                return
            table = history.query(sys.stdin.read() if sql == "-" else sql)
        if parquet is not None:
            _write_parquet(table, parquet)
        elif as_json:
            _print_json(table)
        elif as_csv:
            _print_csv(table)
        else:
            _print_table(table)
    except (ValueError, pa.ArrowException) as error:
        raise click.ClickException(str(error)) from None


@contextlib.contextmanager
def _limits(timeout_seconds: float) -> Iterator[None]:
    """What DuckDB's own limits do not hold: its lists and texts are not in its memory limit, and a single expression
    is not interrupted. So the kernel refuses memory, and a process that does not stop ends itself."""
    giving_up = threading.Timer(timeout_seconds + GRACE_SECONDS, _give_up, [timeout_seconds])
    giving_up.daemon = True
    giving_up.start()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _data_bytes() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        giving_up.cancel()
        giving_up.join()


def _data_bytes() -> int:
    """What the process has of its own."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[5]) * resource.getpagesize()


def _give_up(seconds: float) -> None:
    message = f"Error: stopped after {seconds:g} seconds, in one expression that could not be interrupted"
    print(message, file=sys.stderr, flush=True)  # noqa: T201
    os._exit(1)


def _write_parquet(table: pa.Table, path: str) -> None:
    _check_names(table)
    try:
        with open(path, "wb") as file:
            pq.write_table(table, file)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None
    click.echo(f"{_count(table.num_rows)} in {path}", err=True)


def _print_json(table: pa.Table) -> None:
    _check_names(table)
    click.echo("[", nl=False)
    for number, row in enumerate(_plain_rows(table)):
        text = json.dumps(dict(zip(table.column_names, row, strict=True)), ensure_ascii=False, allow_nan=False)
        click.echo(("," if number else "") + "\n" + text, nl=False)
    click.echo("\n]" if table.num_rows else "]")


def _print_csv(table: pa.Table) -> None:
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(table.column_names)
    for row in _plain_rows(table):
        out.writerow([json.dumps(value) if isinstance(value, bool | list | dict) else value for value in row])


def _check_names(table: pa.Table) -> None:
    for name in table.column_names:
        if table.column_names.count(name) > 1:
            raise ValueError(f"two columns are named {name!r}: name one of them with AS")


def _plain_rows(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    """Rows of what JSON can say: times in ISO 8601, NaN and infinities as null, maps as objects."""
    for batch in table.to_batches(max_chunksize=1000):
        columns = [[_plain(value, column.type) for value in column.to_pylist()] for column in batch.columns]
        yield from zip(*columns, strict=True)


def _plain(value: Any, arrow: pa.DataType) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):  # sum() of integers is one
        return int(value) if arrow.scale == 0 else float(value)
    if isinstance(value, date | time):
        return value.isoformat()
    if pa.types.is_map(arrow):
        return {str(_plain(key, arrow.key_type)): _plain(item, arrow.item_type) for key, item in value}
    if isinstance(value, list):
        return [_plain(item, arrow.value_type) for item in value]
    if isinstance(value, dict):
        return {field.name: _plain(value[field.name], field.type) for field in arrow}
    return str(value)


def _print_table(table: pa.Table) -> None:
    if table.column_names == ["explain_key", "explain_value"]:
        click.echo("\n".join(table.column("explain_value").to_pylist()))
        return
    # Into a file or a pipe every column goes; on a terminal those that fit side by side.
    room = Console().width if sys.stdout.isatty() else sys.maxsize
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    columns: list[list[str]] = []
    width = -BETWEEN_COLUMNS
    for name, column in zip(table.column_names, table.slice(0, ROWS_SHOWN).columns, strict=True):
        cells = [_cell(value) for value in column.to_pylist()]
        widest = max(map(cell_len, [name, *cells]))
        if columns and width + BETWEEN_COLUMNS + widest > room:
            break
        width += BETWEEN_COLUMNS + widest
        number = any(is_kind(column.type) for is_kind in NUMBERS)
        shown.add_column(Text(name), justify="right" if number else "left", no_wrap=True)
        columns.append(cells)
    for row in zip(*columns, strict=True):
        shown.add_row(*map(Text, row))
    Console(width=max(width, 1)).print(shown)
    for note in _notes(table, len(columns)):
        click.echo(note)


def _notes(table: pa.Table, columns: int) -> Iterator[str]:
    if table.num_rows > ROWS_SHOWN:
        yield f"the first {ROWS_SHOWN} of {_count(table.num_rows)}; --json, --csv or --parquet FILE give all"
    else:
        yield _count(table.num_rows)
    if columns < table.num_columns:
        yield f"{columns} of {table.num_columns} columns fit here; name the ones you want in SELECT"


def _count(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"


def _cell(value: Any) -> str:
    """A value in few characters, on one line."""
    text = _short(value)
    text = "".join(character if character.isprintable() else " " for character in text)
    return text if len(text) <= CELL_CHARACTERS else text[: CELL_CHARACTERS - 1] + "…"


def _short(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"
        case datetime():
            return f"{value:%Y-%m-%d %H:%M:%S}" + ("Z" if value.tzinfo else "")
        case dict():
            return "{" + ", ".join(f"{name}: {_short(item)}" for name, item in value.items()) + "}"
        case [(_, _), *_] if isinstance(value[0], tuple):
            return _short(dict(value))
        case list():
            items = ", ".join(_short(item) for item in value[:LIST_ITEMS_SHOWN])
            return f"[{items}]" if len(value) <= LIST_ITEMS_SHOWN else f"[{items}, … {len(value)} values]"
    return str(value)
