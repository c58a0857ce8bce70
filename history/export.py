"""Exports: the records and alerts of runs, to where people already look. Called by `eigenwatch export`.

The target itself knows what it has: it is asked before anything is written, so an export may be killed at any moment
and run again, and nothing is lost or there twice. Each attempt of a run is a run of its own in the target, since a
restart repeats steps. A record is exported once; one that ranks are missing from waits for them for a while.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow.compute as pc

from ..schemas import METRIC_NAMES
from .session import History

QUALITY = ("tokens_per_width", "complete", "finite")
"""Never null. A target has a record when it has its `finite`, so that one is written last."""
WAIT_SECONDS = 600.0
"""A record of a running run that lacks ranks is exported this long after it was written."""
OVERLAP = timedelta(hours=1)
"""Files become visible in another order than their rows were written; no writer is later than this."""
ROWS_AT_ONCE = 1000
PREFIX = "eigenwatch"

_Row = dict[str, Any]


class Attempt(NamedTuple):
    """One attempt of a run: what becomes a run in the target."""

    run_id: str
    number: int
    status: str
    world_size: int | None
    tags: dict[str, str]

    @property
    def name(self) -> str:
        return self.run_id if self.number == 0 else f"{self.run_id}/attempt-{self.number}"


class Point(NamedTuple):
    """One value at a step."""

    tag: str
    value: float


class Record(NamedTuple):
    """All values of one record."""

    step: int
    series: str
    time: float
    """Unix time of the capture."""
    points: list[Point]

    @property
    def key(self) -> tuple[str, int]:
        return self.series, self.step


class Note(NamedTuple):
    """An alert in its current state."""

    step: int
    series: str
    kind: str
    state: str
    time: float
    text: str

    @property
    def key(self) -> tuple[str, int]:
        return f"alerts/{self.series}/{self.kind}_{self.state}", self.step


class Target(Protocol):
    """Somewhere to export one attempt to."""

    def exported(self) -> set[tuple[str, int]]:
        """Keys of what is there already."""

    def write(self, records: list[Record], notes: list[Note]) -> None:
        """Adds these; there at the latest when `commit` returns."""

    def commit(self) -> None: ...

    def close(self, status: str) -> None:
        """Takes no more for now; the run has this status."""


class Opener(Protocol):
    """Opens targets of one kind."""

    where: str
    """For people."""

    def open(self, attempt: Attempt) -> Target: ...


@dataclass(slots=True)
class Exported:
    """What an export did."""

    run_id: str
    status: str = "unknown"
    records: int = 0
    alerts: int = 0
    waiting: int = 0
    """Records that lack ranks, and are exported later."""


class Export:
    """The export of one run, which may be repeated while the run writes; keeps what it has opened until `close`."""

    def __init__(self, history: History, run_id: str, opener: Opener) -> None:
        self._history = history
        self._run_id = run_id
        self._opener = opener
        self._targets: dict[int, Target] = {}
        self._done: dict[int, set[tuple[str, int]]] = {}
        self._since: dict[int, datetime] = {}
        """By attempt: records that were written before are not looked at again."""
        self._listed: object = None
        self.done = Exported(run_id)
        """What was exported so far."""

    def run(self) -> None:
        """Exports what is new.

        Raises:
            ValueError: there is no such run, or the target refused.
        """
        listed = [store.live(self._run_id) for store in self._history.stores]
        attempts = self._attempts()
        if not attempts:
            there = self._history.query("SELECT DISTINCT run_id FROM runs ORDER BY run_id").column(0).to_pylist()
            known = f"; there are {', '.join(there)}" if there else ""
            where = ", ".join(store.uri for store in self._history.stores)
            raise ValueError(f"no run {self._run_id!r} in {where}{known}")
        self.done.status = attempts[-1].status
        if listed != self._listed or self.done.waiting:
            self.done.waiting = 0
            for attempt in attempts:
                self._run_attempt(attempt)
        self._listed = listed

    def close(self) -> None:
        for target in self._targets.values():
            target.close(self.done.status)

    def _attempts(self) -> list[Attempt]:
        told = self._history.query("SELECT * FROM runs WHERE run_id = ? ORDER BY attempt", [self._run_id]).to_pylist()
        runs = {row["attempt"]: row for row in told}
        sql = "SELECT DISTINCT attempt FROM records WHERE run_id = ? ORDER BY attempt"
        numbers = {*runs, *self._history.query(sql, [self._run_id]).column(0).to_pylist()}
        return [_attempt(self._run_id, number, runs.get(number, {})) for number in sorted(numbers)]

    def _run_attempt(self, attempt: Attempt) -> None:
        number = attempt.number
        if number not in self._targets:
            self._targets[number] = self._opener.open(attempt)
            self._done[number] = self._targets[number].exported()
        target, done = self._targets[number], self._done[number]
        columns = ", ".join(("step", "layer", "site", "expert", "captured_at", "written_at", *METRIC_NAMES, *QUALITY))
        sql = f"""
            SELECT {columns}, complete OR epoch(written_at) < ? AS settled FROM records
            WHERE run_id = ? AND attempt = ? AND written_at >= ? ORDER BY step, layer, site, expert
        """
        settled_before = time.time() - WAIT_SECONDS if attempt.status == "running" else math.inf
        since = self._since.get(number, datetime.fromtimestamp(0, UTC))
        table = self._history.query(sql, [settled_before, self._run_id, number, since])
        for batch in table.to_batches(max_chunksize=ROWS_AT_ONCE):
            new = [row for row in batch.to_pylist() if _key(row) not in done]
            records = [_record(row) for row in new if row["settled"]]
            self.done.waiting += len(new) - len(records)
            if records:
                target.write(records, [])
                done.update(record.key for record in records)
                self.done.records += len(records)
        newest = pc.max(table["written_at"]).as_py()
        if newest is not None:
            self._since[number] = newest - OVERLAP
        sql = "SELECT * FROM alerts WHERE run_id = ? AND attempt = ? ORDER BY step, layer"
        alerts = self._history.query(sql, [self._run_id, number]).to_pylist()
        notes = [note for note in map(_note, alerts) if note.key not in done]
        if notes:
            target.write([], notes)
            done.update(note.key for note in notes)
            self.done.alerts += len(notes)
        target.commit()


def series_name(layer: int, site: str, expert: int | None) -> str:
    """`layer_03`; the site only where it is not `post`, the expert where there is one."""
    text = f"layer_{layer:02d}" + ("" if site == "post" else f"_{site}")
    return text if expert is None else f"{text}_expert_{expert:03d}"


def missing_extra(extra: str) -> ValueError:
    return ValueError(f"{extra} is not installed here: pip install 'eigenwatch[{extra}]'")


@contextlib.contextmanager
def only_export(folder: Path) -> Iterator[None]:
    """Keeps a second export out of a folder; one that dies lets go of it.

    Raises:
        ValueError: another is at work there, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".eigenwatch-export.lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}): pass another --out") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"another export writes to {folder}: wait for it, or pass another --out") from None
    try:
        yield
    finally:
        os.close(lock)


def _attempt(run_id: str, number: int, row: _Row) -> Attempt:
    tags = dict(row.get("tags") or [])
    return Attempt(run_id, number, row.get("status", "unknown"), row.get("world_size"), tags)


def _key(row: _Row) -> tuple[str, int]:
    return series_name(row["layer"], row["site"], row["expert"]), row["step"]


def _record(row: _Row) -> Record:
    series, step = _key(row)
    points = [
        Point(f"{PREFIX}/{name}/{series}", float(row[name]))
        for name in (*METRIC_NAMES, *QUALITY)
        if row[name] is not None and math.isfinite(row[name])
    ]
    return Record(step, series, row["captured_at"].timestamp(), points)


def _note(row: _Row) -> Note:
    series = series_name(row["layer"], row["site"], row["expert"])
    text = f"{row['severity']} {row['kind']}, {row['state']}: {row['reason']}"
    return Note(row["step"], series, row["kind"], row["state"], row["written_at"].timestamp(), text)
