"""What a coordinator or a shard that starts again takes up from the store: the launches that were under way, what had
been counted of them, and of each series the newest records and the alerts.

Pure reading; who owns the state decides what to do with it. Files are narrow and many: what is wide is read only of the
few rows that count.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from datetime import datetime
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from ..schemas import ALERTS, RECORDS, RUN_ID_PATTERN, RUNS, LayerDescription, RunDescription, SeriesKey
from ..schemas.store import Store
from .snapshot import RunCounters
from .stored import rows

log = logging.getLogger("eigenwatch.aggregator")

_UNREADABLE = (OSError, ValueError, pa.ArrowException)
_SERIES = ["layer", "site", "expert"]
_JUDGED = ["hard_rank", "hard_utilization", "spectral_concentration", "width", "finite"]


class StoredLaunch(NamedTuple):
    """A launch that the store says is running."""

    run: RunDescription
    """Its layers without their shares, which no row tells."""
    attempt: int
    started_at: datetime
    heard_at: datetime
    """When the newest row or record of it was written."""
    run_id_in_use: bool
    counters: dict[str, RunCounters]
    """By the incarnation of the shard that counted."""
    losses: dict[int, dict[str, int]]
    """Partials that the ranks lost, by rank and reason."""
    ended: dict[int, bool]
    """Ranks that send nothing more, and whether they closed rather than died."""


class SeriesMemory(NamedTuple):
    """The newest of one series."""

    latest: dict[str, Any]
    """The newest row of `records`, all columns."""
    judged: list[dict[str, Any]]
    """The newest rows that a detector saw, one a step, oldest first."""


def launches_under_way(store: Store, run_id: str | None = None) -> list[StoredLaunch]:
    """The launches of a run, or of all, whose newest row says "running"."""
    found = []
    for run in sorted({place.run_id for place in store.listed(run_id) if place.table == "runs"}):
        if not RUN_ID_PATTERN.fullmatch(run):
            continue
        try:
            launches = [_launch(run, row) for row in _newest_rows(store, run)]
            found += [one._replace(heard_at=last_written(store, run, one.attempt) or one.heard_at) for one in launches]
        except (*_UNREADABLE, TypeError) as error:  # it must not keep the others from starting
            log.error("run %s: what was under way is not known, its table cannot be read: %s", run, error)
    return found


def stored_launch(store: Store, run_id: str, attempt: int) -> StoredLaunch | None:
    """What the newest row of a launch says of it, whether it runs or has ended; None where there is none."""
    try:
        table = rows(store, run_id, "runs", RUNS.names, ds.field("attempt") == attempt)
        newest = table.sort_by([("written_at", "descending")]).slice(0, 1).to_pylist()
        return _launch(run_id, newest[0]) if newest else None
    except (*_UNREADABLE, TypeError) as error:
        log.error("run %s: what was counted of it is not known, its table cannot be read: %s", run_id, error)
        return None


def last_written(store: Store, run_id: str, attempt: int) -> datetime | None:
    """When the newest row or record of a launch was written: somebody heard of it until then at least."""
    newest = []
    for table in ("runs", "records"):
        try:
            written = rows(store, run_id, table, ["written_at"], ds.field("attempt") == attempt)["written_at"]
        except _UNREADABLE as error:
            log.error("run %s: %s cannot be read: %s", run_id, table, error)
            continue
        newest.append(pc.max(written).as_py())
    return max((one for one in newest if one is not None), default=None)


def captured_after(store: Store, run_id: str, attempt: int, moment: datetime) -> bool:
    """Whether the store has a record of this launch that was captured later than that."""
    wanted = (ds.field("attempt") == attempt) & (ds.field("captured_at") > pa.scalar(moment, pa.timestamp("us", "UTC")))
    try:
        return bool(rows(store, run_id, "records", ["step"], wanted).num_rows)
    except _UNREADABLE as error:
        log.error("run %s: its records cannot be read: %s", run_id, error)
        return False


def series_memory(store: Store, run_id: str, attempt: int, samples: int) -> dict[SeriesKey, SeriesMemory]:
    """The newest of each series of a launch, with as many judged steps as `samples`."""
    of_launch = ds.field("attempt") == attempt
    columns = ["step", *_SERIES, *_JUDGED, "written_at"]
    newest_first = [("step", "descending"), ("written_at", "descending")]
    table = rows(store, run_id, "records", columns, of_launch).sort_by(newest_first)
    if not table.num_rows:
        return {}
    table = table.append_column("row", pa.array(range(table.num_rows)))
    grouped = table.group_by(_SERIES, use_threads=False).aggregate([("row", "list")])
    rows_of = {
        SeriesKey(run_id, attempt, **{name: group[name] for name in _SERIES}): numbers
        for group, numbers in zip(grouped.select(_SERIES).to_pylist(), grouped["row_list"], strict=True)
    }
    newest = table.take([numbers.values[0].as_py() for numbers in rows_of.values()]).select(["step", "written_at"])
    wide = rows(store, run_id, "records", RECORDS.names, of_launch & ds.field("step").isin(pc.unique(newest["step"])))
    latest: dict[SeriesKey, dict[str, Any]] = {}
    for row in wide.sort_by([("step", "ascending"), ("written_at", "ascending")]).to_pylist():
        latest[_series(run_id, row)] = row
    return {
        series: SeriesMemory(latest[series], _newest_judged(table, numbers.values, samples))
        for series, numbers in rows_of.items()
    }


def stored_alerts(store: Store, run_id: str, attempt: int) -> dict[tuple[SeriesKey, str], dict[str, Any]]:
    """The newest row of each kind of alert on each series of a launch."""
    table = rows(store, run_id, "alerts", ALERTS.names, ds.field("attempt") == attempt)
    in_order = table.sort_by([("written_at", "ascending"), ("step", "ascending")]).to_pylist()
    return {(_series(run_id, row), row["kind"]): row for row in in_order}


def kept_columns(
    counters: dict[str, RunCounters], losses: dict[int, dict[str, int]], ended: dict[int, bool]
) -> dict[str, Any]:
    """The columns of `runs` that keep what `StoredLaunch` gives back."""
    dropped: dict[str, int] = {}
    for counted in (*(dict(one.dropped) for one in counters.values()), *losses.values()):
        for reason, partials in counted.items():
            dropped[reason] = dropped.get(reason, 0) + partials
    return {
        "dropped": sorted(dropped.items()),
        "counters": [
            {"shard": shard, **one._asdict(), "dropped": list(one.dropped)} for shard, one in sorted(counters.items())
        ],
        "losses": [
            {"rank": rank, "reason": reason, "partials": partials}
            for rank, by_reason in sorted(losses.items())
            for reason, partials in sorted(by_reason.items())
        ],
        "ranks_ended": [{"rank": rank, "clean": clean} for rank, clean in sorted(ended.items())],
    }


def _launch(run_id: str, row: dict[str, Any]) -> StoredLaunch:
    layers = tuple(LayerDescription(**layer, shares=()) for layer in row["layers"])
    run = RunDescription(
        run_id=run_id, launch_id=row["launch_id"], world_size=row["world_size"], layers=layers, tags=dict(row["tags"])
    )
    counters = {
        one["shard"]: RunCounters(
            one["received"],
            one["duplicated"],
            one["records_written"],
            tuple(map(tuple, one["dropped"])),
            one["messages"] or 0,
        )
        for one in row["counters"] or ()
    }
    losses: dict[int, dict[str, int]] = {}
    for one in row["losses"] or ():
        losses.setdefault(one["rank"], {})[one["reason"]] = one["partials"]
    return StoredLaunch(
        run,
        row["attempt"],
        row["started_at"],
        row["written_at"],
        bool(row["run_id_in_use"]),
        counters,
        losses,
        {one["rank"]: one["clean"] for one in row["ranks_ended"] or ()},
    )


def _newest_rows(store: Store, run_id: str) -> Iterable[dict[str, Any]]:
    """Of each attempt, in order, whose newest row says that it runs."""
    narrow = rows(store, run_id, "runs", ["attempt", "written_at"]).group_by("attempt")
    narrow = narrow.aggregate([("written_at", "max")])
    newest = dict(zip(narrow["attempt"].to_pylist(), narrow["written_at_max"].to_pylist(), strict=True))
    wide = rows(store, run_id, "runs", RUNS.names, ds.field("written_at").isin(pc.unique(narrow["written_at_max"])))
    found = {row["attempt"]: row for row in wide.to_pylist() if row["written_at"] == newest[row["attempt"]]}
    return [row for _, row in sorted(found.items()) if row["status"] == "running"]


def _newest_judged(table: pa.Table, numbers: pa.Array, samples: int) -> list[dict[str, Any]]:
    """As many newest steps, and as many of them that are finite."""
    judged: dict[int, dict[str, Any]] = {}
    for number in numbers:
        row = table.slice(number.as_py(), 1).to_pylist()[0]
        if row["hard_rank"] is not None if row["finite"] else len(judged) < samples:
            judged.setdefault(row["step"], row)
        if sum(one["finite"] for one in judged.values()) == samples:
            break
    return [judged[step] for step in sorted(judged)]


def _series(run_id: str, row: dict[str, Any]) -> SeriesKey:
    return SeriesKey(run_id, row["attempt"], *(row[name] for name in _SERIES))
