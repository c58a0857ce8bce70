"""The judge: feeds each layer's records to its detectors and keeps the alerts that stand.

An alert stands here, and on the endpoint, as soon as its record is solved; its row becomes durable with that record. So
a judge that starts again finds in the store either both, or neither, and then the record comes again and is judged
again.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..schemas import COLLAPSE, NON_FINITE, RecordKey, SeriesKey
from .collapse import CollapseDetector
from .detector import Detector, Observation, Transition
from .non_finite import NonFiniteDetector

RECALLED_SAMPLES = max(COLLAPSE.window_samples, NON_FINITE.leave_samples)
"""How many of a series' newest records a judge needs that starts again."""


class Alert(NamedTuple):
    """The state of one kind of alert on one layer."""

    series: SeriesKey
    kind: str
    severity: str
    firing: bool


class Judge:
    """Owns the detectors of every series; the shard calls it under its lock."""

    def __init__(self) -> None:
        self._detectors: dict[SeriesKey, list[Detector]] = {}
        self._last_step: dict[SeriesKey, int] = {}
        self._open: dict[tuple[SeriesKey, str], str] = {}
        """Ids of the alerts that fire."""
        self.alerts: dict[tuple[SeriesKey, str], Alert] = {}

    def judge(self, key: RecordKey, record: dict[str, Any]) -> list[dict[str, Any]]:
        """The rows of `alerts` (without `written_at`) that a new record causes.

        A record that is older than one already judged moves no detector.
        """
        series = key.series
        if key.step <= self._last_step.get(series, -1):
            return []
        self._last_step[series] = key.step
        seen, rows = _observation(key.step, record), []
        for detector in self._of(series):
            transition = detector.update(seen)
            if transition is not None:
                rows.append(self._row(key, detector, transition))
        return rows

    def _of(self, series: SeriesKey) -> list[Detector]:
        return self._detectors.setdefault(series, [CollapseDetector(COLLAPSE), NonFiniteDetector(NON_FINITE)])

    def _row(self, key: RecordKey, detector: Detector, transition: Transition) -> dict[str, Any]:
        name = (key.series, detector.kind)
        alert_id = self._open.setdefault(name, uuid.uuid4().hex)
        if not transition.firing:
            del self._open[name]
        self.alerts[name] = Alert(key.series, detector.kind, detector.severity, transition.firing)
        return {
            "alert_id": alert_id,
            **_key_columns(key),
            "kind": detector.kind,
            "severity": detector.severity,
            "state": "firing" if transition.firing else "resolved",
            "since_step": transition.since_step,
            "reason": transition.reason,
            "evidence_steps": transition.evidence_steps,
        }

    def recall(
        self,
        judged: Mapping[SeriesKey, Sequence[Mapping[str, Any]]],
        alerts: Mapping[tuple[SeriesKey, str], Mapping[str, Any]],
    ) -> None:
        """Takes up the series of a launch where a judge before this one left them; causes no rows.

        Args:
            judged: of each series the newest records that it judged, oldest first.
            alerts: the newest row of each alert, by series and kind.
        """
        for series, records in judged.items():
            self._detectors.pop(series, None)
            for detector in self._of(series):
                detector.recall(_observation(record["step"], record) for record in records)
            if records:
                self._last_step[series] = records[-1]["step"]
        for (series, kind), row in alerts.items():
            firing = row["state"] == "firing"
            self.alerts[(series, kind)] = Alert(series, kind, row["severity"], firing)
            if firing:
                self._open[(series, kind)] = row["alert_id"]
                for detector in self._of(series):
                    if detector.kind == kind:
                        detector.recall_firing(row["since_step"])

    def forget(self, ended: set[tuple[str, int]]) -> None:
        """Drops the series of launches, (run, attempt), that have ended."""
        self.forget_series(lambda one: (one.run_id, one.attempt) in ended)

    def forget_series(self, gone: Callable[[SeriesKey], bool]) -> None:
        """Drops those of which this says so."""
        for series in [one for one in self._detectors if gone(one)]:
            del self._detectors[series]
            self._last_step.pop(series, None)
        for name in [one for one in self.alerts if gone(one[0])]:
            del self.alerts[name]
            self._open.pop(name, None)


def _observation(step: int, record: Mapping[str, Any]) -> Observation:
    def value(name: str) -> float:
        return math.nan if record[name] is None else float(record[name])

    return Observation(
        step,
        value("hard_rank"),
        value("hard_utilization"),
        value("spectral_concentration"),
        record["width"],
        record["finite"],
    )


def _key_columns(key: RecordKey) -> dict[str, Any]:
    columns = key._asdict()
    del columns["run_id"]
    return columns
