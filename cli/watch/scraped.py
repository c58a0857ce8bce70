"""The watch over an exporter: what Prometheus would scrape, for a run whose store is out of reach.

An exporter shows the last values only, so the history of a metric begins with the watch, and rates are the difference
of two looks. It tells which alerts are active, not why; the reason is put together from the layer's own gauges.
"""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from ...schemas import prometheus as names
from .view import (
    HISTORY_SAMPLES,
    RATE_SECONDS,
    VALUES,
    Firing,
    Ingestion,
    Layer,
    Series,
    SeveralRuns,
    View,
    sorting,
    states_of,
    waiting,
)

ANSWER_SECONDS = 5.0


class Looked(NamedTuple):
    """A counter at a time."""

    at: float
    records: float


class ScrapedSource:
    """Views of one run of an exporter."""

    def __init__(self, url: str, run_id: str | None, metric: str) -> None:
        self._url = url
        self._run_id = run_id
        self._metric = metric
        self._history: dict[Series, dict[int, float | None]] = {}
        """By step."""
        self._looks: deque[Looked] = deque()
        self._attempt: str | None = None
        self._last: View | None = None
        self._chosen: str | None = None

    def read(self, now: float) -> View:
        try:
            with urllib.request.urlopen(self._url, timeout=ANSWER_SECONDS) as answer:
                text = answer.read().decode()
            scrape = Scrape(text)
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = error.reason if isinstance(error, urllib.error.URLError) else error
            return self._without(f"no answer from {self._url} ({why})")
        runs = {sample.labels["run"]: sample for sample in scrape.of(names.RUN_INFO)}
        if self._run_id is None and len(runs) > 1:
            raise SeveralRuns([*runs])
        if self._run_id is None and runs:
            self._run_id = next(iter(runs))
            self._chosen = "the run under way"
        if self._run_id is None:
            return self._without(f"no run under way at {self._url}")
        if self._run_id not in runs:
            others = f"; there are {', '.join(sorted(runs))}" if runs else ""
            return self._without(f"{self._run_id} is not under way at {self._url}{others}")
        self._last = self._view(scrape, runs[self._run_id], now)
        return self._last

    def close(self) -> None:
        pass

    def _without(self, note: str) -> View:
        """What was seen last, and why it is no more."""
        if self._last is None:
            return waiting(self._url, self._metric, note)
        return self._last._replace(status="unknown", waiting_for=(note,))

    def _view(self, scrape: Scrape, info: Sample, now: float) -> View:
        if info.labels["attempt"] != self._attempt:
            self._attempt = info.labels["attempt"]
            self._history = {}
        run = info.labels["run"]
        gauges = {
            name: scrape.by_series(names.PREFIX + name, run)
            for name in (*VALUES, self._metric, "width", "finite", "complete", "last_record_step")
        }
        written = scrape.by_series(names.LAST_RECORD_TIMESTAMP.name, run)
        alerts = [
            Firing(series, sample.labels["kind"], sample.labels["severity"], None, _reason(gauges, series))
            for sample in scrape.of(names.ALERT_ACTIVE)
            if sample.labels["run"] == run and sample.value
            for series in [_series(sample)]
        ]
        layers = [
            self._layer(series, gauges, [alert for alert in alerts if alert.series == series], written[series], now)
            for series in sorted(written, key=sorting)
        ]
        return View(
            self._url, run, "running", int(info.labels["attempt"]), int(info.labels["world_size"]), self._metric,
            layers, sorted(alerts, key=lambda alert: sorting(alert.series)),
            self._ingestion(scrape, run, gauges["complete"], written, now), self._chosen,
        )  # fmt: skip

    def _layer(
        self, series: Series, gauges: dict[str, dict[Series, float]], alerts: list[Firing], written: float, now: float
    ) -> Layer:
        step = int(gauges["last_record_step"].get(series, 0))
        history = self._history.setdefault(series, {})
        history[step] = gauges[self._metric].get(series)
        for old in sorted(history)[:-HISTORY_SAMPLES]:
            del history[old]
        width = gauges["width"].get(series)
        finite = bool(gauges["finite"].get(series, 1.0))
        states = states_of(
            alerts=alerts,
            finite=finite,
            complete=bool(gauges["complete"].get(series, 1.0)),
            skipped=finite and series not in gauges["hard_rank"],
            idle_seconds=now - written,
        )
        values = {name: gauges[name].get(series) for name in (*VALUES, self._metric)}
        recent = [history[one] for one in sorted(history)]
        return Layer(series, states, None if width is None else int(width), step, values, recent, written)

    def _ingestion(
        self, scrape: Scrape, run: str, complete: dict[Series, float], written: dict[Series, float], now: float
    ) -> Ingestion:
        records = scrape.of_run(names.RECORDS_WRITTEN.name, run)
        if self._looks and records < self._looks[-1].records:
            self._looks.clear()  # the exporter has started again
        self._looks.append(Looked(now, records))
        while now - self._looks[0].at > RATE_SECONDS and len(self._looks) > 2:
            self._looks.popleft()
        first, seconds = self._looks[0], now - self._looks[0].at
        shards = {sample.labels["state"]: int(sample.value) for sample in scrape.of(names.SHARDS)}
        backlog = [sample.value for sample in scrape.of(names.BACKLOG_SECONDS)]
        return Ingestion(
            last_record_at=max(written.values(), default=None),
            records_per_second=(records - first.records) / seconds if seconds else None,
            complete_ratio=sum(complete.values()) / len(complete) if complete else None,
            dropped={
                sample.labels["reason"]: int(sample.value)
                for sample in scrape.of(names.PARTIALS_DROPPED)
                if sample.labels["run"] == run and sample.name.endswith("_total")
            },
            backlog_seconds=backlog[0] if backlog else None,
            shards_here=shards.get("here"),
            shards_away=shards.get("away"),
            run_id_in_use=bool(scrape.of_run(names.RUN_ID_IN_USE.name, run)),
        )


class Scrape:
    """One answer of the exporter, by family."""

    def __init__(self, text: str) -> None:
        """Raises ValueError where the text is no exposition."""
        self._families = {family.name: family.samples for family in text_string_to_metric_families(text)}
        if names.BUILD_INFO.name not in self._families:
            raise ValueError("it shows no eigenwatch metrics")

    def of(self, family: names.Family) -> list[Sample]:
        return self._families.get(family.name, [])

    def of_run(self, name: str, run: str) -> float:
        """The value of a family that has one for each run; 0 where it has none."""
        found = (one.value for one in self._families.get(name, []) if one.labels["run"] == run)
        return next(found, 0.0)

    def by_series(self, name: str, run: str) -> dict[Series, float]:
        return dict(self._of_series(name, run))

    def _of_series(self, name: str, run: str) -> Iterator[tuple[Series, float]]:
        for sample in self._families.get(name, []):
            if sample.labels["run"] == run:
                yield _series(sample), sample.value


def _series(sample: Sample) -> Series:
    expert = sample.labels.get("expert")
    return Series(int(sample.labels["layer"]), sample.labels["site"], None if expert is None else int(expert))


def _reason(gauges: dict[str, dict[Series, float]], series: Series) -> str:
    known = [
        (name.replace("_", " "), gauges[name][series])
        for name in ("hard_rank", "hard_utilization", "spectral_concentration")
        if series in gauges[name]
    ]
    return "now " + ", ".join(f"{name} {value:.3g}" for name, value in known)
