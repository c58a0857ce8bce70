"""The store's writer: whole Parquet files, durable when `append` returns.

A file becomes visible complete or not at all (see `schemas.store`), so whoever looks after a crash finds what `append`
has returned from. Every file has one writer and is never changed.

Rows are turned into a file's bytes before the store is touched. So what goes wrong tells who is to blame: OSError, the
store refused, and the same rows may be appended later; UnwritableRows, these rows never can be.
"""

import errno
import os
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from ..schemas import TABLES
from ..schemas.object_store import one_line
from ..schemas.parts import encode, part_name
from ..schemas.store import Place, open_store


class UnwritableRows(ValueError):
    """Rows that the table's schema does not allow."""


class StoreWriter:
    """Appends rows to the tables of a store. Not thread-safe; one owner."""

    def __init__(self, store: str | os.PathLike[str]) -> None:
        """Raises ValueError where the store cannot be written."""
        self.store = open_store(store)
        try:
            self.store.check_writable()
        except OSError as error:
            raise ValueError(
                f"store {self.store.uri!r} cannot be written ({one_line(error)}): pass another with --store"
            ) from None

    def append(self, table: str, run_id: str, rows: list[dict[str, Any]]) -> str:
        """Writes rows of one run as one new file; durable on return.

        Returns:
            The file's address: its path, or its URI in an object store.

        Raises:
            OSError: the store refused; nothing was written.
            UnwritableRows: a value is missing, or is not what its column takes; nothing was written.
        """
        (address,) = self.append_tables(run_id, {table: rows})
        return address

    def append_tables(self, run_id: str, rows_by_table: dict[str, list[dict[str, Any]]]) -> list[str]:
        """The same for rows of several tables, a file each, in this order.

        Raises:
            OSError: the store refused one, which may be written later; those before it are written.
            UnwritableRows: as `append`; nothing was written of any table.
        """
        encoded = {table: _encoded(table, rows) for table, rows in rows_by_table.items()}
        addresses = []
        for table, data in encoded.items():
            path = f"{Place(run_id, table).folder}/{part_name(datetime.now(UTC))}"
            self.store.put(path, data)
            addresses.append(self.store.address(path))
        return addresses


def _encoded(table: str, rows: list[dict[str, Any]]) -> pa.Buffer:
    try:
        return encode(pa.Table.from_pylist(rows, schema=TABLES[table]), table)
    except MemoryError as error:  # pyarrow's own among them
        raise OSError(errno.ENOMEM, f"no memory for {len(rows)} rows of {table}: {error}") from None
    except (pa.ArrowException, ValueError, TypeError, OverflowError, AttributeError) as error:
        raise UnwritableRows(f"rows of {table} that can never be written: {error}") from error
