"""The catalogue of Prometheus families: names, types, help and labels, as the exporter shows them.

Labels are `run` and `layer`, with `site` and `expert`; never step, rank or eigenvalue index, whose number of
values grows with the run.
"""

from typing import Literal, NamedTuple

from .metrics import DATA_QUALITY, METRICS

PREFIX = "eigenwatch_"
SERIES_LABELS = ("run", "layer", "site", "expert")


class Family(NamedTuple):
    """One metric family of the exposition."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    labels: tuple[str, ...]


RECORD_GAUGES = tuple(Family(PREFIX + m.name, "gauge", m.help, SERIES_LABELS) for m in METRICS + DATA_QUALITY)

LAST_RECORD_TIMESTAMP = Family(
    "eigenwatch_last_record_timestamp_seconds",
    "gauge",
    "Unix time when the last record was written.",
    SERIES_LABELS,
)
LAST_RECORD_STEP = Family("eigenwatch_last_record_step", "gauge", "Optimizer step of the last record.", SERIES_LABELS)
RUN_INFO = Family(
    "eigenwatch_run_info", "gauge", "1 for each running run; what it is stands in the labels.",
    ("run", "attempt", "world_size", "layers"),
)  # fmt: skip
RUN_ID_IN_USE = Family(
    "eigenwatch_run_id_in_use",
    "gauge",
    "1 while two jobs train under this run id at once, else 0.",
    ("run",),
)
BUILD_INFO = Family(
    "eigenwatch_build_info", "gauge", "1; the versions stand in the labels.", ("version", "torch", "ray")
)
ALERT_ACTIVE = Family(
    "eigenwatch_alert_active", "gauge", "1 while the alert is active, 0 after it was resolved.",
    ("run", "layer", "site", "expert", "kind", "severity"),
)  # fmt: skip
PARTIALS_RECEIVED = Family("eigenwatch_partials_received", "counter", "Partials accepted and merged.", ("run",))
MESSAGES_RECEIVED = Family(
    "eigenwatch_messages_received",
    "counter",
    "Messages that carried them: one for a record and host, where its ranks' partials were merged there.",
    ("run",),
)
PARTIALS_DUPLICATED = Family(
    "eigenwatch_partials_duplicated",
    "counter",
    "Partials that had been merged already, and were ignored.",
    ("run",),
)
PARTIALS_DROPPED = Family(
    "eigenwatch_partials_dropped",
    "counter",
    "Partials that were lost or refused, by reason.",
    ("run", "reason"),
)
RECORDS_WRITTEN = Family("eigenwatch_records_written", "counter", "Records durable in the store.", ("run",))
SOLVE_SECONDS = Family("eigenwatch_solve_seconds", "histogram", "Time to solve and measure one record.", ())
LATENCY_SECONDS = Family(
    "eigenwatch_record_latency_seconds", "histogram", "From the end of the step to the durable record.", ()
)
BACKLOG_SECONDS = Family(
    "eigenwatch_backlog_seconds",
    "gauge",
    "How long the oldest merged record has waited for a solver; runs are asked to sample less when it grows.",
    (),
)
SHARDS = Family(
    "eigenwatch_shards", "gauge", "Shards that own layers (here), and that do not answer (away).", ("state",)
)
SNAPSHOT_TIMESTAMP = Family(
    "eigenwatch_snapshot_timestamp_seconds",
    "gauge",
    "Unix time when the shards last answered the exporter.",
    (),
)

FAMILIES = (
    *RECORD_GAUGES,
    LAST_RECORD_TIMESTAMP,
    LAST_RECORD_STEP,
    RUN_INFO,
    RUN_ID_IN_USE,
    BUILD_INFO,
    ALERT_ACTIVE,
    PARTIALS_RECEIVED,
    MESSAGES_RECEIVED,
    PARTIALS_DUPLICATED,
    PARTIALS_DROPPED,
    RECORDS_WRITTEN,
    SOLVE_SECONDS,
    LATENCY_SECONDS,
    BACKLOG_SECONDS,
    SHARDS,
    SNAPSHOT_TIMESTAMP,
)
