"""What the store has of a run already, for a shard or coordinator that starts, or starts again."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from ..schemas import TABLES, RecordKey
from ..schemas.store import Place, Store


def stored_records(store: Store, run_id: str, attempt: int) -> dict[RecordKey, int]:
    """Ranks in each record of a launch that the store has. Raises ValueError where it cannot be read."""
    if attempt < 0:
        return {}
    columns = ["step", "layer", "site", "expert", "ranks_seen"]
    table = _read(store, run_id, "records", columns, ds.field("attempt") == attempt)
    stored: dict[RecordKey, int] = {}
    for row in table.to_pylist():
        ranks_seen = row.pop("ranks_seen")
        key = RecordKey(run_id=run_id, attempt=attempt, **row)
        stored[key] = max(ranks_seen, stored.get(key, 0))
    return stored


def stored_attempts(store: Store, run_id: str) -> dict[str, int]:
    """The attempt of each launch of the run, by launch id. Raises ValueError where the store cannot be read."""
    table = _read(store, run_id, "runs", ["attempt", "launch_id"])
    return dict(zip(table["launch_id"].to_pylist(), table["attempt"].to_pylist(), strict=True))


def _read(store: Store, run_id: str, table: str, columns: list[str], filter: Any = None) -> pa.Table:
    place = Place(run_id, table)
    files = [store.inner(f"{place.folder}/{name}") for name in store.live(run_id).get(place, [])]
    dataset = ds.dataset(files, schema=TABLES[table], format="parquet", filesystem=store.filesystem)
    return dataset.to_table(columns, filter=filter)
