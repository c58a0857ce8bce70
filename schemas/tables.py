"""The store: Arrow schemas of its tables and where their files lie.

    <store>/run_id=<id>/{records,eigenvalues,alerts,runs}/part-*.parquet

The store is a local folder or the URI of an object store (see `store`). The run id stands in the path only, so that
a query about one run opens no other run's files. Narrow scalars and wide spectra are separate tables, so that a
question about ranks reads no eigenvalues. Tables are append-only: a row supersedes an earlier one of the same key by
`written_at`.
"""

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa

from .metrics import METRIC_NAMES

SCHEMA_VERSION = 1
DEFAULT_STORE = "eigenwatch-store"
STORE_VARIABLE = "EIGENWATCH_STORE"

_METADATA = {b"eigenwatch_schema_version": str(SCHEMA_VERSION).encode()}
_TIME = pa.timestamp("us", tz="UTC")
_SERIES = [
    pa.field("attempt", pa.int32(), nullable=False),
    pa.field("layer", pa.int32(), nullable=False),
    pa.field("site", pa.string(), nullable=False),
    pa.field("expert", pa.int32()),
]
_KEY = [pa.field("step", pa.int64(), nullable=False), *_SERIES]
_WRITTEN_AT = pa.field("written_at", _TIME, nullable=False)

RECORDS = pa.schema(
    [
        *_KEY,
        pa.field("width", pa.int32(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("tokens_per_width", pa.float64(), nullable=False),
        *(pa.field(name, pa.float64()) for name in METRIC_NAMES),
        pa.field("hard_rank_correction", pa.string()),  # "pairs" or "gaussian"
        pa.field("finite", pa.bool_(), nullable=False),
        pa.field("complete", pa.bool_(), nullable=False),
        pa.field("ranks_seen", pa.int32(), nullable=False),
        pa.field("ranks_expected", pa.int32(), nullable=False),
        pa.field("ranks_missing", pa.list_(pa.int32())),  # null where the record is complete
        pa.field("form", pa.string(), nullable=False),  # "scatter", "samples" or "mixed"
        pa.field("sampling_steps", pa.int64()),
        pa.field("overhead_ratio", pa.float64()),
        pa.field("solver", pa.string()),  # the path taken: "cpu-float64", "cuda-float32-gram", …; or "skipped"
        pa.field("solver_error", pa.float64()),  # relative standard error of soft_rank, where it is an estimate
        pa.field("solve_seconds", pa.float64(), nullable=False),
        pa.field("captured_at", _TIME, nullable=False),
        _WRITTEN_AT,
    ],
    metadata=_METADATA,
)

EIGENVALUES = pa.schema(
    # float32: the scatter they come from is float32 on the wire.
    [*_KEY, pa.field("eigenvalues", pa.list_(pa.float32()), nullable=False), _WRITTEN_AT],
    metadata=_METADATA,
)

ALERTS = pa.schema(
    [
        pa.field("alert_id", pa.string(), nullable=False),
        *_KEY,
        pa.field("kind", pa.string(), nullable=False),
        pa.field("severity", pa.string(), nullable=False),
        pa.field("state", pa.string(), nullable=False),  # "firing" or "resolved"
        pa.field("since_step", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("evidence_steps", pa.list_(pa.int64()), nullable=False),
        _WRITTEN_AT,
    ],
    metadata=_METADATA,
)

RUNS = pa.schema(
    [
        pa.field("attempt", pa.int32(), nullable=False),
        pa.field("launch_id", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),  # "running", "finished" or "lost"
        pa.field("world_size", pa.int32(), nullable=False),
        pa.field(
            "layers",
            pa.list_(
                pa.struct(
                    [
                        pa.field("layer", pa.int32()),
                        pa.field("site", pa.string()),
                        pa.field("expert", pa.int32()),
                        pa.field("name", pa.string()),
                        pa.field("width", pa.int32()),
                    ]
                )
            ),
            nullable=False,
        ),
        pa.field("tags", pa.map_(pa.string(), pa.string()), nullable=False),
        pa.field("started_at", _TIME, nullable=False),
        pa.field("ended_at", _TIME),
        # Null where nothing was said of it yet: whether another launch of this run id trains at the same time,
        pa.field("run_id_in_use", pa.bool_()),
        # how many partials were lost or refused, by reason,
        pa.field("dropped", pa.map_(pa.string(), pa.int64())),
        # and who counted them, for an aggregator that starts again: see `aggregator.recovery`.
        pa.field(
            "counters",
            pa.list_(
                pa.struct(
                    [
                        pa.field("shard", pa.string()),
                        pa.field("received", pa.int64()),
                        pa.field("messages", pa.int64()),
                        pa.field("duplicated", pa.int64()),
                        pa.field("records_written", pa.int64()),
                        pa.field("dropped", pa.map_(pa.string(), pa.int64())),
                    ]
                )
            ),
        ),
        pa.field(
            "losses",
            pa.list_(
                pa.struct(
                    [pa.field("rank", pa.int32()), pa.field("reason", pa.string()), pa.field("partials", pa.int64())]
                )
            ),
        ),
        pa.field("ranks_ended", pa.list_(pa.struct([pa.field("rank", pa.int32()), pa.field("clean", pa.bool_())]))),
        _WRITTEN_AT,
    ],
    metadata=_METADATA,
)

TABLES = {"records": RECORDS, "eigenvalues": EIGENVALUES, "alerts": ALERTS, "runs": RUNS}


def default_store() -> str:
    """`$EIGENWATCH_STORE`, else `./eigenwatch-store`."""
    return os.environ.get(STORE_VARIABLE) or DEFAULT_STORE


def absolute_store(store: str | os.PathLike[str]) -> str:
    """A store for processes elsewhere: a folder's absolute path, or the URI of an object store as it is."""
    text = os.fspath(store)
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    return text if "://" in text else os.path.abspath(text)


def table_folder(store: str | os.PathLike[str], run_id: str, table: str) -> Path:
    """Where the files of one table of one run lie in a local store."""
    assert table in TABLES, table
    return Path(store) / f"run_id={run_id}" / table
