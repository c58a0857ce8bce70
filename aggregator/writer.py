"""The store's writer: whole Parquet files, durable when `append` returns.

A file is written under a temporary name in its folder, fsynced, renamed, and the folder is fsynced, so a reader sees
a complete file or none, and so does whoever looks after a crash. Every file has one writer and is never changed.
"""

import os
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..schemas import TABLES, table_folder


class StoreWriter:
    """Appends rows to the tables of a local store. Not thread-safe; one owner."""

    def __init__(self, store: str | os.PathLike[str]) -> None:
        """Raises ValueError where the store cannot be written."""
        self.store = Path(store)
        try:
            self.store.mkdir(parents=True, exist_ok=True)
            probe = self.store / f".writable-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"store {str(self.store)!r} cannot be written ({error.strerror}): pass another with --store"
            ) from None

    def append(self, table: str, run_id: str, rows: list[dict[str, Any]]) -> Path:
        """Writes rows of one run as one new file; durable on return.

        Raises:
            OSError: the file system refused; nothing was written.
        """
        folder = table_folder(self.store, run_id, table)
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            for parent in (folder.parent, self.store):
                _fsync_folder(parent)
        name = f"part-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{uuid.uuid4().hex[:8]}.parquet"
        temporary = folder / f".{name}.tmp"
        try:
            # Spectra hardly repeat: byte-stream split lets zstd find what their exponents share.
            pq.write_table(
                pa.Table.from_pylist(rows, schema=TABLES[table]),
                temporary,
                compression="zstd",
                use_dictionary=table != "eigenvalues",
                use_byte_stream_split=["eigenvalues.list.element"] if table == "eigenvalues" else False,
            )
            _fsync_file(temporary)
            temporary.rename(folder / name)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        _fsync_folder(folder)
        return folder / name


def _fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
