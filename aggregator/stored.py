"""What the store has of a run already, for a shard or coordinator that starts, or starts again."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.dataset as ds

from ..schemas import TABLES, RecordKey
from ..schemas.store import Place, Store


def stored_records(store: Store, run_id: str, attempt: int) -> dict[RecordKey, frozenset[int]]:
    """The records of a launch that the store has, and which ranks each lacks.

    Raises ValueError where it cannot be read.
    """
    if attempt < 0:
        return {}
    columns = ["step", "layer", "site", "expert", "ranks_missing"]
    table = rows(store, run_id, "records", columns, ds.field("attempt") == attempt)
    stored: dict[RecordKey, frozenset[int]] = {}
    for row in table.to_pylist():
        missing = frozenset(row.pop("ranks_missing") or ())
        key = RecordKey(run_id=run_id, attempt=attempt, **row)
        stored[key] = min(missing, stored.get(key, missing), key=len)
    return stored


def stored_attempts(store: Store, run_id: str) -> dict[str, int]:
    """The attempt of each launch of the run, by launch id. Raises ValueError where the store cannot be read."""
    table = rows(store, run_id, "runs", ["attempt", "launch_id"])
    return dict(zip(table["launch_id"].to_pylist(), table["attempt"].to_pylist(), strict=True))


def rows(store: Store, run_id: str, table: str, columns: list[str], wanted: ds.Expression | None = None) -> pa.Table:
    """Rows of one table of a run, in the parts that count. Raises ValueError where the store cannot be read."""
    place = Place(run_id, table)
    files = [store.inner(f"{place.folder}/{name}") for name in store.live(run_id).get(place, [])]
    dataset = ds.dataset(files, schema=TABLES[table], format="parquet", filesystem=store.filesystem)
    return dataset.to_table(columns, filter=wanted)
