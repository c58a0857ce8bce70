"""The coordinator: knows which launches of which runs are under way, and which shard owns which layer.

It sees no partials. Couriers open a launch here, say every few seconds that their rank lives, and finish. It writes the
`runs` table, from which it takes up, after a restart, what was under way and what had been counted of it.

A store may have other aggregators, an embedded one for each job, so what the table says is running need not be ours: it
is shown for a while, until its couriers speak or not, and it is lost only when nobody writes anything of it either.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from ..schemas import RunDescription
from ..schemas.delivery import OPEN_AGAIN, Opened
from .launches import OpenLaunch
from .ownership import owners
from .recovery import StoredLaunch, captured_after, last_written, launches_under_way, stored_launch
from .snapshot import Launch, RunCounters, RunState
from .stored import stored_attempts
from .writer import StoreWriter, UnwritableRows

log = logging.getLogger("eigenwatch.aggregator")

LOST_SECONDS = 3600.0
"""A run of which no rank was heard for this long is lost. Long, so that the staleness alert comes first."""
REPLACED_SECONDS = 60.0
"""The same for a launch whose run was started again."""
AWAITED_SECONDS = 120.0
"""How long a launch that is known from the store only is shown. Couriers are back sooner, whatever restarted."""
COUNTERS_SECONDS = 60.0
"""Between rows that say only what was counted."""
LOOK_SECONDS = 60.0
"""Between looks for run ids that two jobs use."""
OVERLAP_SECONDS = 60.0
"""Two launches of one run id train at the same time if the earlier one captured something so long after the later one
began. Heartbeats alone do not show it: the couriers of a job that crashed, and later those of its successor, go on
delivering what it left. Long, since clocks differ."""
REMEMBERED_ENDED = 1000
Counted = Mapping[str, Mapping[str, RunCounters]]
"""By incarnation of a shard and run."""
EARLIER = "earlier"
"""Under which the counters of all shards are added that are no more."""


class Coordinator:
    """The registry of launches. Methods are called from several threads."""

    def __init__(self, store: str, shard_names: list[str]) -> None:
        self._writer = StoreWriter(store)
        self._shard_names = shard_names
        self._incarnations: dict[str, str] = {}
        self._epoch = _next_epoch(0)
        self._stretch: dict[str, int] = {}
        self._launches: dict[Launch, OpenLaunch] = {}
        self._ended: deque[Launch] = deque(maxlen=REMEMBERED_ENDED)
        self._counters: dict[str, dict[str, RunCounters]] = {}
        """By run under way and incarnation of the shard that counted."""
        self._kept = False
        self._awaited_until = time.monotonic() + AWAITED_SECONDS
        self._next_look = 0.0
        self._written_at = datetime.fromtimestamp(0, UTC)
        self._lock = threading.RLock()
        stored = launches_under_way(self._writer.store)
        self._take_up(stored)
        self._counters |= {one.run.run_id: one.counters for one in stored}

    def open_run(self, run_wire: dict[str, Any]) -> Opened:
        """Opens a launch; each of its ranks asks, and all get the same answer. Idempotent."""
        run = RunDescription.from_wire(run_wire)
        with self._lock:
            launch = next(
                (one for one in self._launches.values() if one.run.launch_id == run.launch_id), None
            ) or self._open(run)
            launch.run = run  # one from the store lacks what no row tells
            launch.speaks()
            return Opened(launch.attempt, owners(run, self._shard_names), list(self._shard_names), self._epoch)

    def set_shards(self, shards: Mapping[str, str], stretch: Mapping[str, int]) -> None:
        """Who shares the layers from now on; couriers learn it with their next heartbeat.

        Args:
            shards: incarnations by name. One that started again has to be told of every launch, as a new one has.
            stretch: how far runs are asked to stretch their cadence, 1 where a run is not named.
        """
        with self._lock:
            if shards != self._incarnations:
                self._shard_names, self._incarnations = list(shards), dict(shards)
                self._epoch = _next_epoch(self._epoch)
            self._stretch = dict(stretch)

    def heartbeat(self, run_id: str, attempt: int, rank: int, dropped: dict[str, int], epoch: int | None = None) -> int:
        """A rank lives; `dropped` is what it has lost so far by reason.

        Returns:
            how far its cadence is to be stretched; `OPEN_AGAIN` if the launch must be opened again: it is not known, or
            layers have had other owners since `epoch`.
        """
        with self._lock:
            launch = self._launches.get((run_id, attempt))
            if launch is None:
                return OPEN_AGAIN
            launch.speaks()
            launch.lost(rank, dropped)
            return self._stretch.get(run_id, 1) if epoch is None or epoch == self._epoch else OPEN_AGAIN

    def finish(self, run_id: str, attempt: int, rank: int, clean: bool, dropped: dict[str, int]) -> None:
        """A rank sends nothing more: it closed (`clean`) or died. The last one ends the launch."""
        with self._lock:
            launch = self._launches.get((run_id, attempt))
            if launch is None:
                return
            launch.speaks()
            launch.lost(rank, dropped)
            launch.ended.setdefault(rank, clean)  # what it said itself counts, not what is found of it later
            launch.next_row = 0.0  # a coordinator that starts again must not wait for this rank
            if len(launch.ended) == launch.run.world_size:
                self._end(launch, "finished" if all(launch.ended.values()) else "lost")

    def running(self, counted: Counted | None = None, before: Counted | None = None) -> list[RunState]:
        """The newest launch of each run under way; launches not heard of for long are ended first.

        An earlier launch of a run that was started again may still have partials to deliver: it stays open, unshown.

        Args:
            counted: what the shards have counted since they started. It is kept, and written now and then, for when one
                of them or this coordinator starts again.
            before: the same as the caller knew it last time, newer than what was written, if we start again.
        """
        self._look_for_overlaps()
        with self._lock:
            if counted and not self._kept:
                self._keep(before or {})
                self._kept = True
            self._keep(counted or {})
            newest = self._newest()
            for launch in list(self._launches.values()):
                self._end_silent(launch, replaced=launch.attempt < newest[launch.run.run_id])
            self._write_kept(only_due=True)
            awaited = time.monotonic() < self._awaited_until
            return [self._state(one) for one in self._current() if one.heard or awaited]

    def close(self, counted: Counted) -> None:
        """Writes what was counted of launches under way."""
        with self._lock:
            self._keep(counted)
            self._write_kept(only_due=False)

    def ended(self) -> list[Launch]:
        """Launches that ended lately."""
        with self._lock:
            return list(self._ended)

    def _state(self, launch: OpenLaunch) -> RunState:
        run = launch.run
        dropped = dict(sum((Counter(one) for one in launch.dropped.values()), Counter[str]()))
        earlier = self._counters.get(run.run_id, {}).get(EARLIER, RunCounters())
        in_use = any(one.in_use and one is not launch for one in self._launches_of(run.run_id))
        return RunState(
            run.run_id, launch.attempt, run.world_size, len(run.layers), dropped, earlier, launch.heard, in_use
        )

    def _launches_of(self, run_id: str) -> list[OpenLaunch]:
        """Oldest first."""
        launches = [one for one in self._launches.values() if one.run.run_id == run_id]
        return sorted(launches, key=lambda one: one.attempt)

    def _newest(self) -> dict[str, int]:
        """The newest attempt of each run."""
        newest: dict[str, int] = {}
        for run_id, attempt in self._launches:
            newest[run_id] = max(attempt, newest.get(run_id, 0))
        return newest

    def _current(self) -> list[OpenLaunch]:
        """The newest launch of each run."""
        newest = self._newest()
        return [one for one in self._launches.values() if one.attempt == newest[one.run.run_id]]

    def _take_up(self, stored: list[StoredLaunch]) -> None:
        """Notes launches of which the store says that they run, but for those that we know."""
        for one in stored:
            if (one.run.run_id, one.attempt) in self._launches:
                continue
            silent = (datetime.now(UTC) - one.heard_at).total_seconds()
            self._launches[(one.run.run_id, one.attempt)] = OpenLaunch.taken_up(one, silent)

    def _keep(self, counted: Counted) -> None:
        """Notes what the shards that live have counted. What others had is added up, and what a shard had that has
        forgotten the run since: its launch had ended, and a later job brings what is left of it."""
        for run_id in {run_id for run_id, _ in self._launches} if counted else ():
            before = self._counters.get(run_id, {})
            kept = {shard: by_run[run_id] for shard, by_run in counted.items() if run_id in by_run}
            lost = [
                had for shard, had in before.items() if shard not in kept or kept[shard].received < had.received
            ]  # what was earlier before is among them
            if lost:
                kept[EARLIER] = functools.reduce(RunCounters.plus, lost)
            self._counters[run_id] = kept

    def _kept_of(self, launch: OpenLaunch) -> dict[str, Any]:
        return launch.kept(self._counters.get(launch.run.run_id, {}))

    def _write_kept(self, only_due: bool) -> None:
        """Writes what a coordinator that starts again would not know."""
        for launch in self._current():
            due = not only_due or time.monotonic() >= launch.next_row
            if launch.heard and due and self._kept_of(launch) != launch.written:
                self._write(launch)

    def _end_silent(self, launch: OpenLaunch, replaced: bool) -> None:
        """Ends a launch of which nobody has heard for long: we, or for one from the store whoever writes there."""
        now = time.monotonic()
        patience = REPLACED_SECONDS if replaced else LOST_SECONDS
        if now - launch.heard_at <= patience or not (launch.heard or now >= self._awaited_until):
            return
        if not launch.heard:
            written = last_written(self._writer.store, launch.run.run_id, launch.attempt)
            silent = (datetime.now(UTC) - written).total_seconds() if written is not None else math.inf
            launch.heard_at = now - silent
            if silent <= patience:
                return
        self._end(launch, "lost")

    def _look_for_overlaps(self) -> None:
        """Finds run ids that two jobs use at once. Both stay as they are, attempts of their own; it is said once."""
        with self._lock:
            if time.monotonic() < self._next_look:
                return
            self._next_look = time.monotonic() + LOOK_SECONDS
            runs = {run_id for run_id, _ in self._launches}
            pairs = [pair for run_id in runs for pair in itertools.pairwise(self._launches_of(run_id))]
        for earlier, later in pairs:
            run_id, began = earlier.run.run_id, later.started_at
            if earlier.in_use or not captured_after(
                self._writer.store, run_id, earlier.attempt, began + timedelta(seconds=OVERLAP_SECONDS)
            ):
                continue
            log.error(
                "run_id_in_use: two jobs train as run %s at once, attempt %d since %s and attempt %d since %s; their "
                "records stay apart, and `records` shows the later one's: give each job a run id of its own",
                run_id, earlier.attempt, f"{earlier.started_at:%F %T}", later.attempt, f"{began:%F %T}",
            )  # fmt: skip
            with self._lock:
                for launch in (earlier, later):
                    launch.in_use = True
                    if launch.status == "running" and launch.heard:
                        self._write(launch)

    def _open(self, run: RunDescription) -> OpenLaunch:
        stored = launches_under_way(self._writer.store, run.run_id)
        self._take_up([one for one in stored if one.run.launch_id != run.launch_id])  # another aggregator may have them
        attempt = self._attempt_of(run)
        before = stored_launch(self._writer.store, run.run_id, attempt)
        if before is None:
            launch = OpenLaunch(run=run, attempt=attempt, started_at=datetime.now(UTC), heard_at=time.monotonic())
        else:  # it ended, and what it left comes now
            launch = OpenLaunch.taken_up(before, 0.0)
            launch.run, launch.heard = run, True
            self._counters.setdefault(run.run_id, before.counters)
        self._launches[launch.key] = launch
        if launch.key in self._ended:
            self._ended.remove(launch.key)
        self._write(launch)
        return launch

    def _attempt_of(self, run: RunDescription) -> int:
        """The attempt that the store knows for this launch, else the next one of the run."""
        attempts = stored_attempts(self._writer.store, run.run_id)
        return attempts.get(run.launch_id, max(attempts.values(), default=-1) + 1)

    def _end(self, launch: OpenLaunch, status: str) -> None:
        launch.status = status
        self._write(launch)
        del self._launches[launch.key]
        self._ended.append(launch.key)
        if not self._launches_of(launch.run.run_id):
            self._counters.pop(launch.run.run_id, None)

    def _write(self, launch: OpenLaunch) -> None:
        self._written_at = max(datetime.now(UTC), self._written_at + timedelta(microseconds=1))
        launch.written, launch.next_row = self._kept_of(launch), time.monotonic() + COUNTERS_SECONDS
        try:
            self._writer.append("runs", launch.run.run_id, [launch.row(launch.written, self._written_at)])
        except (OSError, UnwritableRows) as error:
            log.error("run %s: its row could not be written: %s", launch.run.run_id, error)


def _next_epoch(epoch: int) -> int:
    """Later than this one, and than any of a coordinator that died."""
    return max(epoch + 1, time.time_ns() // 1_000_000)
