"""The judge: feeds each layer's records to its detectors and keeps the alerts that stand."""

from __future__ import annotations

import uuid
from typing import Any, NamedTuple

from ..schemas import COLLAPSE, RecordKey, SeriesKey
from .collapse import CollapseDetector, Observation


class Alert(NamedTuple):
    """The state of one kind of alert on one layer."""

    series: SeriesKey
    kind: str
    severity: str
    firing: bool


class Judge:
    """Owns the detectors of every series; called by the shard's worker thread only."""

    def __init__(self) -> None:
        self._detectors: dict[SeriesKey, CollapseDetector] = {}
        self._last_step: dict[SeriesKey, int] = {}
        self._open: dict[tuple[SeriesKey, str], str] = {}
        """Ids of the alerts that fire."""
        self.alerts: dict[tuple[SeriesKey, str], Alert] = {}

    def judge(self, key: RecordKey, record: dict[str, Any]) -> list[dict[str, Any]]:
        """The rows of `alerts` (without `written_at`) that a new record causes.

        A record that is older than one already judged, or that is not finite, moves no detector.
        """
        series = key.series
        detector = self._detectors.setdefault(series, CollapseDetector(COLLAPSE))
        if not record["finite"] or key.step <= self._last_step.get(series, -1):
            return []
        self._last_step[series] = key.step
        seen = Observation(
            key.step,
            record["hard_rank"],
            record["hard_utilization"],
            record["spectral_concentration"],
            record["width"],
        )
        transition = detector.update(seen)
        if transition is None:
            return []
        name = (series, detector.kind)
        alert_id = self._open.setdefault(name, uuid.uuid4().hex)
        if not transition.firing:
            del self._open[name]
        self.alerts[name] = Alert(series, detector.kind, detector.severity, transition.firing)
        return [
            {
                "alert_id": alert_id,
                **_key_columns(key),
                "kind": detector.kind,
                "severity": detector.severity,
                "state": "firing" if transition.firing else "resolved",
                "since_step": transition.since_step,
                "reason": transition.reason,
                "evidence_steps": transition.evidence_steps,
            }
        ]

    def forget(self, ended: set[tuple[str, int]]) -> None:
        """Drops the series of launches, (run, attempt), that have ended."""
        for series in [one for one in self._detectors if (one.run_id, one.attempt) in ended]:
            del self._detectors[series]
            self._last_step.pop(series, None)
        for name in [one for one in self.alerts if (one[0].run_id, one[0].attempt) in ended]:
            del self.alerts[name]
            self._open.pop(name, None)


def _key_columns(key: RecordKey) -> dict[str, Any]:
    columns = key._asdict()
    del columns["run_id"]
    return columns
