"""What the store has of a run already, for a shard or coordinator that starts, or starts again."""

from __future__ import annotations

from pathlib import Path

import pyarrow.dataset as ds

from ..schemas import RECORDS, RUNS, RecordKey, table_folder


def stored_records(store: Path, run_id: str, attempt: int) -> dict[RecordKey, frozenset[int]]:
    """The records of a launch that the store has, and which ranks each lacks."""
    folder = table_folder(store, run_id, "records")
    if attempt < 0 or not folder.is_dir():
        return {}
    columns = ["step", "layer", "site", "expert", "ranks_missing"]
    table = ds.dataset(folder, schema=RECORDS, format="parquet").to_table(
        columns, filter=ds.field("attempt") == attempt
    )
    stored: dict[RecordKey, frozenset[int]] = {}
    for row in table.to_pylist():
        missing = frozenset(row.pop("ranks_missing") or ())
        key = RecordKey(run_id=run_id, attempt=attempt, **row)
        stored[key] = min(missing, stored.get(key, missing), key=len)
    return stored


def stored_attempts(store: Path, run_id: str) -> dict[str, int]:
    """The attempt of each launch of the run, by launch id."""
    folder = table_folder(store, run_id, "runs")
    if not folder.is_dir():
        return {}
    table = ds.dataset(folder, schema=RUNS, format="parquet").to_table(["attempt", "launch_id"])
    return dict(zip(table["launch_id"].to_pylist(), table["attempt"].to_pylist(), strict=True))
