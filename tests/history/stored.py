"""Rows as the aggregator would store them, for tests that read a store; what is not given is plausible."""

import itertools
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from eigenwatch.schemas import TABLES, table_folder

START = datetime(2026, 1, 1, 12, tzinfo=UTC)
NOT_FINITE = {
    "hard_utilization": None,
    "soft_utilization": None,
    "spectral_concentration": None,
    "hard_rank": None,
    "soft_rank": None,
    "finite": False,
}
_file_numbers = itertools.count()

_RECORD = {
    "width": 256,
    "tokens": 1024,
    "tokens_per_width": 4.0,
    "hard_rank": 20.0,
    "soft_rank": 80.0,
    "hard_utilization": 0.0745,
    "soft_utilization": 0.31,
    "spectral_concentration": 0.7,
    "finite": True,
    "complete": True,
    "ranks_seen": 2,
    "ranks_expected": 2,
    "form": "scatter",
    "solver": "cpu-float64",
    "solve_seconds": 0.01,
}
_ALERT = {
    "kind": "collapse",
    "severity": "critical",
    "state": "firing",
    "since_step": 0,
    "reason": "hard utilization fell",
    "evidence_steps": [0, 10],
}
_RUN = {
    "launch_id": "a1",
    "status": "running",
    "world_size": 2,
    "layers": [{"layer": 0, "site": "post", "expert": None, "name": "mlp.down_proj", "width": 256}],
    "tags": {},
    "started_at": START,
}


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def write(store: Path, run_id: str, table: str, *rows: dict[str, Any]) -> Path:
    """One more file of `table` with these rows, as a shard would append it."""
    folder = table_folder(store, run_id, table)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"part-{next(_file_numbers):06d}.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows), schema=TABLES[table]), path)
    return path


def record(step: int, layer: int = 0, *, written: float | None = None, **columns: Any) -> dict[str, Any]:
    """A row of `records`; `written` is in seconds after START, the step where not given."""
    time = at(step if written is None else written)
    return _key(step, layer) | _RECORD | {"captured_at": time, "written_at": time} | columns


def spectrum(step: int, layer: int = 0, *, written: float | None = None, **columns: Any) -> dict[str, Any]:
    """A row of `eigenvalues`; `written` as for its record."""
    time = at(step if written is None else written)
    return _key(step, layer) | {"eigenvalues": [3.0, 2.0, 1.0], "written_at": time} | columns


def alert(alert_id: str, step: int, *, written: float, **columns: Any) -> dict[str, Any]:
    return _key(step, 0) | _ALERT | {"alert_id": alert_id, "written_at": at(written)} | columns


def run(attempt: int = 0, *, written: float, **columns: Any) -> dict[str, Any]:
    return _RUN | {"attempt": attempt, "written_at": at(written)} | columns


def _key(step: int, layer: int) -> dict[str, Any]:
    return {"step": step, "layer": layer, "attempt": 0, "site": "post", "expert": None}
