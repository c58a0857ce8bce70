"""What the exporter shows: immutable values that shards and coordinator hand out once a second."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import NamedTuple

from ..schemas import SeriesKey
from .judge import Alert

Launch = tuple[str, int]
"""(run_id, attempt)"""


class LatestRecord(NamedTuple):
    """The newest durable record of one series."""

    series: SeriesKey
    step: int
    written_at: float
    """Unix time in seconds."""
    values: dict[str, float]
    """Gauges by name; a null metric is absent."""


class Histogram(NamedTuple):
    """Cumulative counts below each bound, as Prometheus wants them."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    """One more than bounds: the last is everything."""
    total_seconds: float

    @classmethod
    def empty(cls, bounds: tuple[float, ...]) -> Histogram:
        return cls(bounds, (0,) * (len(bounds) + 1), 0.0)

    def observe(self, seconds: float) -> Histogram:
        first = bisect_left(self.bounds, seconds)
        counts = tuple(count + (index >= first) for index, count in enumerate(self.counts))
        return Histogram(self.bounds, counts, self.total_seconds + seconds)

    def __add__(self, other: Histogram) -> Histogram:  # type: ignore[override]
        assert self.bounds == other.bounds
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return Histogram(self.bounds, counts, self.total_seconds + other.total_seconds)


SOLVE_BOUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
LATENCY_BOUNDS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


class RunCounters(NamedTuple):
    """What happened to one run's partials in one shard, over all attempts, since the shard started."""

    received: int = 0
    duplicated: int = 0
    records_written: int = 0
    dropped: tuple[tuple[str, int], ...] = ()
    """By reason."""
    messages: int = 0
    """That carried what was received."""

    def plus(self, other: RunCounters) -> RunCounters:
        dropped = Counter(dict(self.dropped)) + Counter(dict(other.dropped))
        return RunCounters(
            self.received + other.received,
            self.duplicated + other.duplicated,
            self.records_written + other.records_written,
            tuple(sorted(dropped.items())),
            self.messages + other.messages,
        )


class ShardSnapshot(NamedTuple):
    """One shard's state."""

    incarnation: str
    latest: list[LatestRecord]
    alerts: list[Alert]
    counters: dict[str, RunCounters]
    """By run."""
    solve_seconds: Histogram
    latency_seconds: Histogram
    backlog_seconds: float
    stretch: dict[str, int]
    """By run: how far its cadence is to be stretched, for this shard to keep up."""


class RunState(NamedTuple):
    """A launch that is under way."""

    run_id: str
    attempt: int
    world_size: int
    layers: int
    dropped: dict[str, int]
    """Partials that the ranks lost before any shard saw them, by reason."""
    earlier: RunCounters = RunCounters()
    """What shards had counted that are no more."""
    heard: bool = True
    """False for a launch that is known from the store only, since its aggregator started again or is another."""
    in_use: bool = False
    """Whether an earlier launch of the same run id trains at the same time."""


class Snapshot(NamedTuple):
    """Everything that the endpoint shows."""

    taken_at: float
    """Unix time in seconds."""
    runs: list[RunState]
    shards: list[ShardSnapshot]
    away: int = 0
    """Shards that do not answer, and own nothing meanwhile."""

    @property
    def counted(self) -> dict[str, dict[str, RunCounters]]:
        """See `counted_by`."""
        return counted_by(self.shards)


def counted_by(shards: list[ShardSnapshot]) -> dict[str, dict[str, RunCounters]]:
    """What shards have counted, by incarnation and run."""
    return {shard.incarnation: shard.counters for shard in shards}
