"""The watch over a store: a folder or an object store, read while the run writes.

The history is asked once for the last samples of every layer. From then on each look lists the run's parts and reads
only those that are new, so that watching costs a listing a second, however large the store has grown.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ...history import History, open_history
from ...history.export import OVERLAP
from ...schemas.store import Place, Store, open_store
from .view import (
    HISTORY_SAMPLES,
    NO_RECORD,
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

_COLUMNS = (
    "step", "attempt", "layer", "site", "expert", "width", "finite", "complete", "ranks_seen", "ranks_missing",
    "solver", "captured_at", "written_at",
)  # fmt: skip
_RUNS = """
    SELECT * FROM runs QUALIFY row_number() OVER (PARTITION BY run_id ORDER BY attempt DESC) = 1
    ORDER BY started_at DESC, run_id
"""
_ALERTS = "SELECT * FROM alerts WHERE run_id = ? AND state = 'firing' AND attempt = ? ORDER BY since_step, layer"
_Row = dict[str, Any]


class StoredSource:
    """Views of one run of a store."""

    def __init__(self, store: str, run_id: str | None, metric: str) -> None:
        """Raises ValueError for a URI that cannot be used."""
        self._store = open_store(store)
        self._given = store
        self._run_id = run_id
        self._metric = metric
        self._columns = [*dict.fromkeys((*_COLUMNS, *VALUES, metric))]
        self._history: History | None = None
        self._records: Records | None = None
        self._seen: set[str] = set()
        """Parts of the run that were looked into."""
        self._run: _Row = {}
        self._alerts: list[Firing] = []
        self._chosen: str | None = None
        self._last: View | None = None

    def read(self, now: float) -> View:
        try:
            self._last = self._read(now)
            return self._last
        except SeveralRuns:
            raise
        except ValueError as error:  # an object store that is away for a moment
            last = self._last or waiting(self._given, self._metric, "")
            return last._replace(waiting_for=(str(error),))

    def close(self) -> None:
        if self._history is not None:
            self._history.close()

    def _read(self, now: float) -> View:
        if self._history is None:
            if not self._store.exists():
                return waiting(self._given, self._metric, f"no store at {self._given}")
            self._history = open_history(self._given)
        if self._records is None and not self._start(self._history):
            return waiting(self._given, self._metric, self._missing(self._history))
        self._follow(self._history)
        return self._view(now)

    def _start(self, history: History) -> bool:
        """Chooses the run and reads its last samples; False while it is not there."""
        if self._run_id is None:
            self._run_id = self._choose(history.query(_RUNS).to_pylist())
        if self._run_id is None:
            return False
        listed = self._store.live(self._run_id)
        if not listed:
            return False
        # What is listed now is in the answer; what comes meanwhile is too, and is read again, which does no harm.
        self._seen = {name for place, names in listed.items() for name in names if place.table == "records"}
        sql = f"""
            SELECT {", ".join(self._columns)} FROM records WHERE run_id = ?
            QUALIFY row_number() OVER (PARTITION BY layer, site, expert ORDER BY step DESC) <= {HISTORY_SAMPLES}
        """
        self._records = Records(history.query(sql, [self._run_id]).to_pylist())
        return True

    def _choose(self, runs: list[_Row]) -> str | None:
        running = [run["run_id"] for run in runs if run["status"] == "running"]
        if len(running) > 1:
            raise SeveralRuns(running)
        if not runs:
            return None
        self._chosen = f"{'the run under way' if running else 'the newest run'} of {len(runs)}"
        chosen: str = (running or [runs[0]["run_id"]])[0]
        return chosen

    def _missing(self, history: History) -> str:
        if self._run_id is None:
            return f"no run in {self._given}"
        there = [run["run_id"] for run in history.query(_RUNS).to_pylist()]
        return f"no run {self._run_id} in {self._given}" + (f"; there are {', '.join(there)}" if there else "")

    def _follow(self, history: History) -> None:
        """Reads the parts that are new."""
        assert self._records is not None
        assert self._run_id is not None
        changed = False
        for place, names in self._store.live(self._run_id).items():
            for name in (name for name in names if name not in self._seen):
                if place.table == "records":
                    rows = _rows(self._store, place, name, self._columns, self._records.newest - OVERLAP)
                    if rows is None:
                        continue
                    self._records.add(rows)
                changed |= place.table in ("alerts", "runs")
                self._seen.add(name)
        if changed or not self._run:
            runs = history.query("SELECT * FROM runs WHERE run_id = ? ORDER BY attempt DESC LIMIT 1", [self._run_id])
            self._run = next(iter(runs.to_pylist()), {})
            alerts = history.query(_ALERTS, [self._run_id, self._run.get("attempt", 0)])
            self._alerts = [_firing(row) for row in alerts.to_pylist()]

    def _view(self, now: float) -> View:
        assert self._records is not None
        status = self._run.get("status", "unknown")
        announced = {_series(layer): layer["width"] for layer in self._run.get("layers", [])}
        kept = self._records.kept
        series = sorted({*announced, *kept}, key=sorting)
        layers = [
            self._layer(one, [*kept.get(one, {}).values()], announced.get(one), now, status == "running")
            for one in series
        ]
        return View(
            self._given, self._run_id, status, self._run.get("attempt"), self._run.get("world_size"), self._metric,
            layers, self._alerts, self._ingestion(now), self._chosen,
        )  # fmt: skip

    def _layer(self, series: Series, rows: list[_Row], width: int | None, now: float, running: bool) -> Layer:
        alerts = [alert for alert in self._alerts if alert.series == series]
        if not rows:
            states = (*(alert.kind for alert in alerts), NO_RECORD)
            return Layer(series, states, width, None, dict.fromkeys(VALUES), [], None)
        last = rows[-1]
        written_at = last["written_at"].timestamp()
        states = states_of(
            alerts=alerts,
            finite=last["finite"],
            complete=last["complete"],
            skipped=last["solver"] == "skipped",
            idle_seconds=now - written_at if running else None,
        )
        values = {name: last[name] for name in (*VALUES, self._metric)}
        history = [row[self._metric] for row in rows]
        return Layer(series, states, last["width"], last["step"], values, history, written_at)

    def _ingestion(self, now: float) -> Ingestion:
        assert self._records is not None
        rows = [row for by_step in self._records.kept.values() for row in by_step.values()]
        last = max(rows, key=lambda row: row["written_at"], default=None)
        recent = sum(now - row["written_at"].timestamp() <= RATE_SECONDS for row in rows)
        newest = [[*by_step.values()][-1] for by_step in self._records.kept.values() if by_step]
        return Ingestion(
            last_record_at=None if last is None else last["written_at"].timestamp(),
            records_per_second=recent / RATE_SECONDS,
            complete_ratio=sum(row["complete"] for row in rows) / len(rows) if rows else None,
            ranks_missing=tuple(sorted({rank for row in newest for rank in row.get("ranks_missing") or []})),
            dropped=dict(self._run.get("dropped") or []),
            latency_seconds=None if last is None else (last["written_at"] - last["captured_at"]).total_seconds(),
            run_id_in_use=bool(self._run.get("run_id_in_use")),
        )


class Records:
    """The last samples of every layer, by step: the view `records` of them, kept up to date row by row."""

    def __init__(self, rows: list[_Row]) -> None:
        self.kept: dict[Series, dict[int, _Row]] = {}
        self.newest = datetime.fromtimestamp(0, UTC) + OVERLAP
        """When the newest of the rows was written."""
        self._first_steps: dict[int, int] = {}
        """By attempt, whose start hides what earlier attempts had reached."""
        self.add(rows)

    def add(self, rows: list[_Row]) -> None:
        touched = {_series(row) for row in rows}
        for row in rows:
            attempt, step = row["attempt"], row["step"]
            self._first_steps[attempt] = min(step, self._first_steps.get(attempt, step))
            self.newest = max(self.newest, row["written_at"])
            steps = self.kept.setdefault(_series(row), {})
            if step not in steps or _standing(row) > _standing(steps[step]):
                steps[step] = row
        starts = {row["attempt"] for row in rows}
        for series in [*self.kept] if len(self._first_steps) > 1 and starts else touched:
            steps = self.kept[series]
            kept = sorted(step for step, row in steps.items() if step < self._end(row["attempt"]))
            self.kept[series] = {step: steps[step] for step in kept[-HISTORY_SAMPLES:]}

    def _end(self, attempt: int) -> float:
        return min((first for later, first in self._first_steps.items() if later > attempt), default=float("inf"))


def _standing(row: _Row) -> tuple[int, int, datetime]:
    return row["attempt"], row["ranks_seen"], row["written_at"]


def _rows(store: Store, place: Place, name: str, columns: list[str], since: datetime) -> list[_Row] | None:
    """Rows of a part that were written since; None where it cannot be read now."""
    try:
        table = store.read(f"{place.folder}/{name}", columns)
    except (OSError, pa.ArrowInvalid):  # merged away since it was listed
        return None
    rows: list[_Row] = table.filter(pc.field("written_at") >= since).to_pylist()
    return [dict.fromkeys(columns) | row for row in rows]


def _series(row: _Row) -> Series:
    return Series(row["layer"], row["site"], row["expert"])


def _firing(row: _Row) -> Firing:
    return Firing(_series(row), row["kind"], row["severity"], row["since_step"], row["reason"])
