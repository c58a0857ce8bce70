"""What crosses a boundary: the partial on the wire, the tables of the store, the names of metrics and gauges.

The agent and the aggregator meet here and nowhere else.
"""

from .forms import GROUP, MIXED, SAMPLES, SCATTER
from .group import Part, PartialGroup
from .keys import RUN_ID_PATTERN, SITES, RecordKey, SeriesKey, check_run_id
from .metrics import DATA_QUALITY, METRIC_NAMES, METRICS, Metric
from .partial import Arrived, Partial, PartialCovariance, PartialSamples, arrived_from_wire, partial_from_wire
from .run import Block, LayerDescription, RunDescription
from .tables import (
    ALERTS,
    EIGENVALUES,
    RECORDS,
    RUNS,
    SCHEMA_VERSION,
    STORE_VARIABLE,
    TABLES,
    absolute_store,
    default_store,
    table_folder,
)
from .thresholds import COLLAPSE, NON_FINITE, STALE_AFTER_SECONDS, CollapseThresholds, NonFiniteThresholds
from .tiles import TILE_ROWS, Tile, packed_length, packed_offset, row_blocks, row_tiles
from .wire import REFUSAL_REASONS, ROWS_DTYPES, WIRE_VERSION, Origin, PartialRefused, WirePartial, payload_dtype

__all__ = [
    "ALERTS",
    "COLLAPSE",
    "DATA_QUALITY",
    "EIGENVALUES",
    "GROUP",
    "METRICS",
    "METRIC_NAMES",
    "MIXED",
    "NON_FINITE",
    "RECORDS",
    "REFUSAL_REASONS",
    "ROWS_DTYPES",
    "RUNS",
    "RUN_ID_PATTERN",
    "SAMPLES",
    "SCATTER",
    "SCHEMA_VERSION",
    "SITES",
    "STALE_AFTER_SECONDS",
    "STORE_VARIABLE",
    "TABLES",
    "TILE_ROWS",
    "WIRE_VERSION",
    "Arrived",
    "Block",
    "CollapseThresholds",
    "LayerDescription",
    "Metric",
    "NonFiniteThresholds",
    "Origin",
    "Part",
    "Partial",
    "PartialCovariance",
    "PartialGroup",
    "PartialRefused",
    "PartialSamples",
    "RecordKey",
    "RunDescription",
    "SeriesKey",
    "Tile",
    "WirePartial",
    "absolute_store",
    "arrived_from_wire",
    "check_run_id",
    "default_store",
    "packed_length",
    "packed_offset",
    "partial_from_wire",
    "payload_dtype",
    "row_blocks",
    "row_tiles",
    "table_folder",
]
