"""The Prometheus endpoint: a collector over an immutable snapshot, and the server that shows it.

A scrape reads one reference and never waits for a shard. Families and labels come from the catalogue in `schemas`;
nothing is registered globally, so several exporters can live in one process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ..schemas import SeriesKey
from ..schemas import prometheus as names
from .snapshot import Histogram, LatestRecord, Snapshot


class SnapshotCollector(Collector):
    """Turns the newest snapshot into metric families at each scrape."""

    def __init__(self, newest: Callable[[], Snapshot]) -> None:
        self._newest = newest
        self._versions = [version("eigenwatch"), version("torch"), version("ray")]

    def collect(self) -> Iterator[Metric]:
        snapshot = self._newest()
        running = {(run.run_id, run.attempt) for run in snapshot.runs}
        newest: dict[SeriesKey, LatestRecord] = {}
        for one in (one for shard in snapshot.shards for one in shard.latest):
            # A shard that was away may still show, for a moment, what another has taken over.
            shown = newest.get(one.series, one)
            if (one.series.run_id, one.series.attempt) in running:
                newest[one.series] = max(one, shown, key=lambda record: (record.step, record.written_at))
        # Not by when each record was written: a scrape is easier to compare.
        latest = sorted(newest.values(), key=lambda one: _order(one.series))
        yield _gauge(names.BUILD_INFO, [(self._versions, 1.0)])
        yield _gauge(names.SNAPSHOT_TIMESTAMP, [([], snapshot.taken_at)])
        yield _gauge(
            names.RUN_INFO,
            [([run.run_id, str(run.attempt), str(run.world_size), str(run.layers)], 1.0) for run in snapshot.runs],
        )
        yield _gauge(names.RUN_ID_IN_USE, [([run.run_id], float(run.in_use)) for run in snapshot.runs])
        for family in names.RECORD_GAUGES:
            column = family.name.removeprefix(names.PREFIX)
            yield _series_gauge(family, latest, _column(column))
        yield _series_gauge(names.LAST_RECORD_TIMESTAMP, latest, lambda one: one.written_at)
        yield _series_gauge(names.LAST_RECORD_STEP, latest, lambda one: float(one.step))
        yield _gauge(names.BACKLOG_SECONDS, [([], max((one.backlog_seconds for one in snapshot.shards), default=0.0))])
        here = len(snapshot.shards) - snapshot.away
        yield _gauge(names.SHARDS, [(["here"], float(max(here, 0))), (["away"], float(snapshot.away))])
        yield from self._alerts(snapshot, newest)
        yield from self._counters(snapshot)
        empty = Histogram.empty
        for family, histograms in (
            (names.SOLVE_SECONDS, [shard.solve_seconds for shard in snapshot.shards]),
            (names.LATENCY_SECONDS, [shard.latency_seconds for shard in snapshot.shards]),
        ):
            if histograms:
                yield _histogram(family, sum(histograms, empty(histograms[0].bounds)))

    def _alerts(self, snapshot: Snapshot, newest: dict[SeriesKey, LatestRecord]) -> Iterator[Metric]:
        family = GaugeMetricFamily(names.ALERT_ACTIVE.name, names.ALERT_ACTIVE.help)
        for shard in snapshot.shards:
            shown = {one.series for one in shard.latest if newest.get(one.series) is one}
            for alert in shard.alerts:
                if alert.series in shown:
                    labels = _series_labels(alert.series) | {"kind": alert.kind, "severity": alert.severity}
                    family.add_sample(family.name, labels, float(alert.firing))
        yield family

    def _counters(self, snapshot: Snapshot) -> Iterator[Metric]:
        received: Counter[str] = Counter({run.run_id: 0 for run in snapshot.runs})
        messages, duplicated, written = received.copy(), received.copy(), received.copy()
        dropped: Counter[tuple[str, str]] = Counter()
        for shard in snapshot.shards:
            for run, counters in shard.counters.items():
                received[run] += counters.received
                messages[run] += counters.messages
                duplicated[run] += counters.duplicated
                written[run] += counters.records_written
                for reason, count in counters.dropped:
                    dropped[(run, reason)] += count
        for state in snapshot.runs:
            received[state.run_id] += state.earlier.received
            messages[state.run_id] += state.earlier.messages
            duplicated[state.run_id] += state.earlier.duplicated
            written[state.run_id] += state.earlier.records_written
            for reason, count in (*state.dropped.items(), *state.earlier.dropped):
                dropped[(state.run_id, reason)] += count
        for family, by_run in (
            (names.PARTIALS_RECEIVED, received),
            (names.MESSAGES_RECEIVED, messages),
            (names.PARTIALS_DUPLICATED, duplicated),
            (names.RECORDS_WRITTEN, written),
        ):
            yield _counter(family, [([run], float(count)) for run, count in sorted(by_run.items())])
        yield _counter(names.PARTIALS_DROPPED, [(list(name), float(count)) for name, count in sorted(dropped.items())])


class Endpoint:
    """The HTTP server, in a thread of its own, until `close`."""

    def __init__(self, newest: Callable[[], Snapshot], host: str, port: int) -> None:
        """Binds at once; raises ValueError where the port cannot be had."""
        registry = CollectorRegistry()
        registry.register(SnapshotCollector(newest))
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except (OSError, OverflowError) as error:
            what = getattr(error, "strerror", None) or str(error)
            raise ValueError(
                f"metrics port {host}:{port} cannot be used ({what}): pass another metrics port, or 0 for a free one"
            ) from None
        self.url = f"http://{host}:{self._server.server_port}/metrics"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _series_labels(series: SeriesKey) -> dict[str, str]:
    labels = {"run": series.run_id, "layer": str(series.layer), "site": series.site}
    return labels if series.expert is None else labels | {"expert": str(series.expert)}


def _order(series: SeriesKey) -> tuple[str, int, str, int]:
    return series.run_id, series.layer, series.site, -1 if series.expert is None else series.expert


def _gauge(family: names.Family, samples: list[tuple[list[str], float]]) -> Metric:
    metric = GaugeMetricFamily(family.name, family.help, labels=family.labels)
    for labels, value in samples:
        metric.add_metric(labels, value)
    return metric


def _counter(family: names.Family, samples: list[tuple[list[str], float]]) -> Metric:
    metric = CounterMetricFamily(family.name, family.help, labels=family.labels)
    for labels, value in samples:
        metric.add_metric(labels, value)
    return metric


def _series_gauge(
    family: names.Family, latest: list[LatestRecord], value: Callable[[LatestRecord], float | None]
) -> Metric:
    metric = GaugeMetricFamily(family.name, family.help)
    for one in latest:
        number = value(one)
        if number is not None:
            metric.add_sample(family.name, _series_labels(one.series), number)
    return metric


def _column(name: str) -> Callable[[LatestRecord], float | None]:
    return lambda one: one.values.get(name)


def _histogram(family: names.Family, histogram: Histogram) -> Metric:
    bounds = [*(repr(bound) for bound in histogram.bounds), "+Inf"]
    metric = HistogramMetricFamily(family.name, family.help)
    metric.add_metric([], list(zip(bounds, histogram.counts, strict=True)), histogram.total_seconds)
    return metric
