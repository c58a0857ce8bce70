"""A shard: merges the partials of its layers, solves, measures, judges and stores.

`push` and the other methods are called from many threads (a Ray actor with several, or the agent's outbox in one
process) and only merge. One worker thread does the rest: it closes records, has them solved in the order of the
backlog, and writes what is solved about once a second. A record counts, for couriers and for the endpoint, when its
file is durable.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Set
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..schemas import (
    DATA_QUALITY,
    GROUP,
    METRIC_NAMES,
    REFUSAL_REASONS,
    Arrived,
    LayerDescription,
    PartialGroup,
    PartialRefused,
    PartialSamples,
    RecordKey,
    RunDescription,
    SeriesKey,
    WirePartial,
    arrived_from_wire,
)
from ..schemas.delivery import Fate, PushReply
from ..spectrum import covariance_of
from .announced import check_announced, check_clock
from .backlog import Backlog
from .config import ShardLimits, SolverConfig
from .judge import RECALLED_SAMPLES, Judge
from .open_records import ClosedRecord, OpenRecords
from .outcomes import Outcomes
from .pressure import Pressure
from .recovery import SeriesMemory, series_memory, stored_alerts
from .site_pairs import SitePairs, sibling_of
from .snapshot import LatestRecord, Launch, ShardSnapshot
from .solved_record import SKIPPED, SolvedRecord, record_of, rows_by_table, skipped_record, solvable
from .solver import LocalSolver, Solved, Solver, unsolved
from .solver_process import SolverProcess
from .stored import stored_records
from .tally import Tally
from .writer import StoreWriter, UnwritableRows

log = logging.getLogger("eigenwatch.aggregator")

IDLE_SECONDS = 0.1
WRITE_SECONDS = 1.0
"""A solved record waits at most about this long for others to share its file."""
UNKNOWN_RUN = "unknown"
"""What partials are counted under whose run is not known."""
STRANGER_SECONDS = 60.0
"""Between an answer of "unknown_run" and the announcement that it asks for; an honest courier needs a second or two."""
REMEMBERED_STRANGERS = 1000


class Owned(NamedTuple):
    """A shard's part of a launch."""

    epoch: int
    layers: frozenset[int]


class Shard:
    """The state of one shard; `close` writes everything it holds."""

    def __init__(self, store: str, solver: SolverConfig, limits: ShardLimits) -> None:
        self.incarnation = uuid.uuid4().hex
        self._writer = StoreWriter(store)
        self._solver: Solver = SolverProcess(solver) if solver.own_process else LocalSolver(solver)
        self._runs: dict[Launch, dict[tuple[int, str, int | None], LayerDescription]] = {}
        self._owned: dict[Launch, Owned] = {}
        """Which of a launch's layers are this shard's."""
        self._latest_only: set[Launch] = set()
        """Launches whose older steps need not be solved once a newer one waits."""
        self._open = OpenRecords(limits.deadline_seconds, limits.memory_bytes)
        self._outcomes = Outcomes()
        self._tally = Tally()
        self._judge = Judge()
        self._pressure = Pressure(limits.behind_seconds)
        self._latest: dict[SeriesKey, LatestRecord] = {}
        self._strangers: OrderedDict[Launch, float] = OrderedDict()
        """Launches that nobody announced, and when they were first heard of."""
        self._backlog = Backlog()
        self._pairs = SitePairs(limits.deadline_seconds)
        self._unwritten: list[SolvedRecord] = []
        self._write_at = 0.0
        self._written_at = datetime.fromtimestamp(0, UTC)
        self._flushing = self._stopping = self._refused = False
        self._in_work: set[tuple[RecordKey, frozenset[int]]] = set()
        """What is on its way into a sum."""
        self._changed = threading.Condition(threading.RLock())
        self._opening = threading.Lock()
        self._worker = threading.Thread(target=self._work, name="eigenwatch-shard", daemon=True)
        self._worker.start()

    def open_run(self, run_wire: dict[str, Any], attempt: int, owned: list[int] | None = None, epoch: int = 0) -> None:
        """Learns a launch's layers and ranks, and what of it the store has already. Idempotent.

        Args:
            run_wire: the run.
            attempt: which launch of it.
            owned: the layers that this shard owns from `epoch` on; all where not given. What it had of others goes:
                their couriers hold it, and push it to the new owner.
            epoch: an ownership that is older than what is known changes nothing.
        """
        run = RunDescription.from_wire(run_wire)
        launch = (run.run_id, attempt)
        layers = frozenset({layer.layer for layer in run.layers} if owned is None else owned)
        with self._opening:  # every rank asks, after a restart all at once, and one reads the store for all
            with self._changed:
                known = self._owned.get(launch)
                if known is not None and epoch <= known.epoch:
                    return
                if known is not None:
                    self._owned[launch] = Owned(known.epoch, known.layers & layers)  # takes no more of what goes
                    self._hand_over(launch, known.layers - layers)
            before = frozenset() if known is None else known.layers
            if layers - before:
                self._take_up(run.run_id, attempt, layers - before)
            with self._changed:
                self._owned[launch] = Owned(epoch, layers)
                self._runs[launch] = {(layer.layer, layer.site, layer.expert): layer for layer in run.layers}
                if run.latest_only:
                    self._latest_only.add(launch)
                self._strangers.pop(launch, None)

    def _take_up(self, run_id: str, attempt: int, layers: frozenset[int]) -> None:
        """Learns what the store has of these layers."""
        stored = stored_records(self._writer.store, run_id, attempt)
        memory, alerts = self._recalled(run_id, attempt)
        with self._changed:
            self._outcomes.recall({key: missing for key, missing in stored.items() if key.layer in layers})
            judged = {series: one.judged for series, one in memory.items() if series.layer in layers}
            self._judge.recall(judged, {name: row for name, row in alerts.items() if name[0].layer in layers})
            for series in judged:
                latest = memory[series].latest
                written_at = latest["written_at"].timestamp()
                self._latest[series] = LatestRecord(series, latest["step"], written_at, _gauges(latest))

    def _hand_over(self, launch: Launch, layers: frozenset[int]) -> None:
        """Forgets layers that another shard owns now, but for what is being solved or written."""
        gone = {one for one in self._latest if (one.run_id, one.attempt) == launch and one.layer in layers}
        for series in gone:
            del self._latest[series]
        self._judge.forget_series(lambda one: (one.run_id, one.attempt) == launch and one.layer in layers)
        self._open.hand_over(launch, layers)

    def _recalled(
        self, run_id: str, attempt: int
    ) -> tuple[dict[SeriesKey, SeriesMemory], dict[tuple[SeriesKey, str], dict[str, Any]]]:
        """The newest of each series of a launch; nothing where the store cannot say, which must not stop the launch."""
        try:
            memory = series_memory(self._writer.store, run_id, attempt, RECALLED_SAMPLES)
            return memory, stored_alerts(self._writer.store, run_id, attempt)
        except (OSError, ValueError, pa.ArrowException) as error:
            log.error("run %s: alerts start anew, its records cannot be read: %s", run_id, error)
            return {}, {}

    def push(self, header: dict[str, Any], mean: NDArray[np.float64], payload: NDArray[Any]) -> PushReply:
        """Merges one partial, given in its wire form."""
        try:
            return self._take(arrived_from_wire(WirePartial(header, mean, payload)))
        except PartialRefused as refused:
            if isinstance(header, dict) and header.get("form") == GROUP:  # each of its partials now comes alone
                return PushReply("refused", refused.reason, str(refused))
            return self._refuse(header, refused.reason, str(refused))
        except Exception as error:
            log.exception("partial refused")
            return self._refuse(header, type(error).__name__, str(error))

    def fates(self, asked: list[tuple[tuple[Any, ...], list[int]]]) -> list[list[Fate]]:
        """What became of ranks' partials: for each record's key, the ranks that are asked about."""
        with self._changed:
            return [[self._fate(RecordKey(*key), rank) for rank in ranks] for key, ranks in asked]

    def _fate(self, key: RecordKey, rank: int) -> Fate:
        merged = self._open.ranks(key) or ()
        fate: Fate = "held" if rank in merged else "unknown"
        # Not open and yet held: a block whose share still lacks others.
        return fate if key in self._open else self._outcomes.fate(key, rank) or fate

    def snapshot(self, ended: list[Launch]) -> ShardSnapshot:
        """The state for the endpoint; launches that have ended are forgotten first."""
        with self._changed:
            self._forget(set(ended))
            runs = {run for run, _ in self._runs} | self._tally.runs
            now = time.monotonic()
            behind = {run: self._open.behind_seconds(run, now) for run, _ in self._runs}
            return ShardSnapshot(
                self.incarnation,
                [one for series, one in self._latest.items() if self._owns(series)],
                [one for (series, _), one in self._judge.alerts.items() if self._owns(series)],
                {run: self._tally.of(run) for run in sorted(runs)},
                self._tally.solve_seconds,
                self._tally.latency_seconds,
                max(behind.values(), default=0.0),
                {run: self._pressure.stretch(run, seconds, now) for run, seconds in behind.items()},
            )

    def _owns(self, series: SeriesKey) -> bool:
        """Not what was handed over while it was solved: another shard shows it."""
        owned = self._owned.get((series.run_id, series.attempt))
        return owned is not None and series.layer in owned.layers

    def flush(self, timeout_seconds: float) -> int:
        """Closes every open record, complete or not, and writes all; returns how many were not written in time."""
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            self._flushing = True
            self._changed.notify_all()
            while self._unfinished() and time.monotonic() < deadline:
                self._changed.wait(IDLE_SECONDS)
            self._flushing = False
            return self._unfinished()

    def close(self, timeout_seconds: float) -> int:
        """Flushes and ends the worker; returns the same."""
        self.flush(timeout_seconds)
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            unfinished = self._unfinished()
        self._worker.join(IDLE_SECONDS if unfinished else timeout_seconds)
        return unfinished

    @property
    def given_up(self) -> int:
        """How many partials were dropped after they had been merged, of late."""
        with self._changed:
            return self._outcomes.given_up

    def _unfinished(self) -> int:
        return len(self._open)  # a record is open until it is durable

    def _take(self, arrived: Arrived) -> PushReply:
        with self._changed:
            turned_away = self._turned_away(arrived)
            if turned_away is not None:
                return turned_away
            shares = self._shares_of(arrived.key)
            work = arrived.key, arrived.ranks
            if work in self._in_work:  # its sender grew tired of waiting and asks again
                return PushReply("busy")
            self._in_work.add(work)
        try:
            # Copying rows, and their product all the more, takes time: pushes of other ranks go on meanwhile.
            mergeable = _mergeable(arrived, shares)
            form = arrived.forms if isinstance(arrived, PartialGroup) else arrived.form
            with self._changed:
                reply = self._turned_away(arrived) or self._merge(mergeable, form)
                fold = self._open.folding(arrived.key) if reply.status == "merged" else None
            if fold is not None:
                fold()  # together with what other threads bring of this record, and beside those of other records
            return reply
        except MemoryError:
            return PushReply("busy")
        finally:
            with self._changed:
                self._in_work.discard(work)

    def _turned_away(self, arrived: Arrived) -> PushReply | None:
        """The answer to what is not to be merged; None for what is.

        Raises:
            PartialRefused: it never will be.
        """
        key = arrived.key
        layers = self._runs.get((key.run_id, key.attempt))
        if layers is None:
            return self._stranger((key.run_id, key.attempt))
        check_clock(arrived)
        check_announced(layers, arrived)
        if key.layer not in self._owned[(key.run_id, key.attempt)].layers:
            return PushReply("unknown_run", None, f"layer {key.layer} of run {key.run_id} has another owner now")
        if self._outcomes.missing(key) == frozenset():
            self._tally.duplicated(key.run_id, len(arrived.ranks))
            return PushReply("durable")
        if self._outcomes.all_given_up(key, arrived.ranks):
            self._tally.duplicated(key.run_id, len(arrived.ranks))
            return PushReply("dropped", None, f"the record {key} was given up, see the log")
        answer = self._open.turned_away(arrived, time.monotonic())
        if answer == "duplicate":
            self._tally.duplicated(key.run_id, len(arrived.ranks))
        return None if answer is None else PushReply(answer)

    def _shares_of(self, key: RecordKey) -> int:
        layers = self._runs[(key.run_id, key.attempt)]
        return len(layers[(key.layer, key.site, key.expert)].shares)

    def _merge(self, arrived: Arrived, form: str) -> PushReply:
        key = arrived.key
        layer = self._runs[(key.run_id, key.attempt)][(key.layer, key.site, key.expert)]
        try:
            merged = self._open.merge(arrived, layer.ranks, time.monotonic(), form)
        except ValueError as error:
            raise PartialRefused("contradiction", str(error)) from None
        assert merged == "merged", "what is turned away was turned away before"
        self._tally.received(key.run_id, len(arrived.ranks))
        self._changed.notify_all()
        return PushReply(merged)

    def _work(self) -> None:
        self._solver.start()  # by this thread, with which it dies
        try:
            self._work_until_stopped()
        finally:
            self._solver.close()

    def _work_until_stopped(self) -> None:
        while True:
            with self._changed:
                self._backlog.add(self._open.close_due(time.monotonic(), everything=self._flushing))
                if self._latest_only:
                    self._skip(self._backlog.superseded(self._latest_only, self._outcomes))
                batch = self._backlog.next()
                ending = self._flushing or self._stopping
                self._ready(self._pairs.overdue(time.monotonic(), everything=ending and not batch))
                idle = not batch and not self._write_due()
                if idle and self._stopping:
                    return
                if idle:
                    self._changed.wait(IDLE_SECONDS)
                    continue
            if batch:
                self._solve_or_drop(batch)
            if self._write_due():
                self._write()

    def _refuse(self, header: dict[str, Any], reason: str, message: str) -> PushReply:
        """Counts a partial that is not taken, under a label that does not come from what was sent."""
        run_id = header.get("run_id") if isinstance(header, dict) else None
        reason = reason if reason in REFUSAL_REASONS else "failed"
        with self._changed:
            known = isinstance(run_id, str) and any(run == run_id for run, _ in self._runs)
            counted = (str(run_id) if known else UNKNOWN_RUN, reason)
            so_far = self._tally.refused(*counted)
        if str(so_far).strip("0") == "1":  # the 1st, 10th, 100th, …: a rank that is wrong is wrong in every sample
            log.warning("run %s: partial refused (%s, %d so far): %s", counted[0], reason, so_far, message)
        return PushReply("refused", reason, message)

    def _stranger(self, launch: Launch) -> PushReply:
        """The answer to a partial of a launch that this shard does not know.

        A courier that hears it announces its run and pushes again: so it goes after a restart, and nothing is lost.
        Whoever pushes on without that is refused.
        """
        now = time.monotonic()
        first = self._strangers.setdefault(launch, now)
        while len(self._strangers) > REMEMBERED_STRANGERS:
            self._strangers.popitem(last=False)
        message = f"nobody announced run {launch[0]}, attempt {launch[1]}, to this shard"
        if now - first > STRANGER_SECONDS:
            self._refuse({}, "unknown_run", message)
        return PushReply("unknown_run", None, message)

    def _write_due(self) -> bool:
        """A flush writes at once, but not again and again into a store that has just refused."""
        hurry = self._flushing and not len(self._backlog) and not self._refused
        return bool(self._unwritten) and (hurry or time.monotonic() >= self._write_at)

    def _solve_or_drop(self, batch: list[ClosedRecord]) -> None:
        """Solves records of one run and width together; what cannot become a record is counted."""
        started = time.perf_counter()
        kept = [closed for closed in batch if not self._dropped_unsolved(closed) and self._folded(closed)]
        jobs = [closed.job for closed in kept if solvable(closed)]
        try:
            answers = iter(self._solver.solve(jobs) if jobs else ())
        except Exception as error:  # no memory, no process
            log.exception("run %s: %d records are lost", batch[0].key.run_id, len(kept))
            for closed in kept:
                self._drop(closed, type(error).__name__)
            return
        for closed in kept:
            try:
                solved = next(answers) if solvable(closed) else unsolved()
                self._solved(closed, solved, (time.perf_counter() - started) / len(batch))
            except Exception as error:
                log.exception("run %s layer %d step %d is lost", closed.key.run_id, closed.key.layer, closed.key.step)
                self._drop(closed, type(error).__name__)
        with self._changed:
            self._backlog.spent(batch[0].key.run_id, time.perf_counter() - started)

    def _dropped_unsolved(self, closed: ClosedRecord) -> bool:
        """Gives up a record that is not to be solved: only a part of a share has come, or the store knows more."""
        stored = self._outcomes.missing(closed.key)
        if stored is not None and len(closed.missing) >= len(stored):
            self._drop(closed, "late")  # a late rank, after its record's group was given up
            return True
        if closed.group.finite and not closed.group.finished and not closed.rows:
            self._drop(closed, "incomplete_share")
            return True
        return False

    def _folded(self, closed: ClosedRecord) -> bool:
        """Adds up what was merged; without the memory for it the record is given up."""
        try:
            closed.fold()
        except MemoryError:
            self._drop(closed, MemoryError.__name__)
            return False
        return True

    def _solved(self, closed: ClosedRecord, solved: Solved, solve_seconds: float) -> None:
        key, record = closed.key, record_of(closed, solved, solve_seconds)
        if solved.failure is not None:
            log.error("run %s layer %d step %d was not solved: %s", key.run_id, key.layer, key.step, solved.failure)
        with self._changed:
            if solved.failure is not None:
                self._tally.dropped(key.run_id, "unsolved", len(closed.ranks))
            # Now and not when it is written: a pair may wait, an alert need not. What moved is judged elsewhere.
            judgeable = record.eigenvalues is not None or not record.row["finite"]
            if judgeable and self._owns(key.series):
                record = record._replace(alerts=tuple(self._judge.judge(key, record.row)))
            self._tally.solved(solve_seconds)
            self._join(record)

    def _skip(self, superseded: list[ClosedRecord]) -> None:
        for closed in superseded:
            self._join(skipped_record(closed))

    def _join(self, record: SolvedRecord) -> None:
        self._open.solved(record.key)
        self._ready(self._pairs.join(record, self._sibling_comes(record.key), time.monotonic()))

    def _drop(self, closed: ClosedRecord, reason: str) -> None:
        with self._changed:
            self._lose(closed.key, closed.ranks, reason)
            self._ready(self._pairs.give_up(closed.key))

    def _lose(self, key: RecordKey, ranks: Set[int], reason: str) -> None:
        """Counts what these ranks sent as dropped, unless it is in a record that is stored."""
        with self._changed:
            layer = self._runs.get((key.run_id, key.attempt), {}).get((key.layer, key.site, key.expert))
            lost = self._outcomes.lose(key, ranks, ranks if layer is None else frozenset(layer.ranks))
            self._tally.dropped(key.run_id, reason, lost)
            self._open.settled(key)
            self._unwritten = [one for one in self._unwritten if one.key != key]
            self._changed.notify_all()

    def _ready(self, solved: list[SolvedRecord]) -> None:
        """Records that wait for nothing but the next file."""
        if solved and not self._unwritten:
            self._write_at = time.monotonic() + WRITE_SECONDS
        self._unwritten.extend(solved)

    def _sibling_comes(self, key: RecordKey) -> bool:
        """Whether the other site of this record's layer is to be solved, or may be: nothing of it has come yet."""
        sibling = sibling_of(key)
        layer = self._runs.get((key.run_id, key.attempt), {}).get((key.layer, key.site, key.expert))
        if layer is None:
            return False
        comes = layer.paired and sibling not in self._open and sibling not in self._outcomes
        return comes or self._open.unsolved(sibling)

    def _write(self) -> None:
        """Writes what is solved, a file a table and run; what the store refuses waits for the next time."""
        self._written_at = max(datetime.now(UTC), self._written_at + timedelta(microseconds=1))
        self._refused = False
        by_run: dict[str, list[SolvedRecord]] = {}
        for one in self._unwritten:
            by_run.setdefault(one.key.run_id, []).append(one)
        for run_id, batch in by_run.items():
            try:
                self._append(run_id, batch)
            except OSError as error:
                log.error("run %s: the store refused %d records, trying again: %s", run_id, len(batch), error)
                self._refused = True
                self._write_at = time.monotonic() + WRITE_SECONDS

    def _append(self, run_id: str, batch: list[SolvedRecord]) -> None:
        """Writes these records and settles them. What no table takes, which no partial can cause, is given up: it
        would be tried for ever."""
        try:
            tables = rows_by_table(batch, self._written_at)
            self._writer.append_tables(run_id, {table: rows for table, rows in tables.items() if rows})
        except UnwritableRows as error:
            log.error("run %s: %d records are lost: %s", run_id, len(batch), error)
            for one in batch:
                self._lose(one.key, self._open.ranks(one.key) or set(), "unwritable")
            return
        self._settle(run_id, batch)

    def _settle(self, run_id: str, batch: list[SolvedRecord]) -> None:
        now = time.time()
        latencies = []
        with self._changed:
            for one in batch:
                under_way = (one.key.run_id, one.key.attempt) in self._runs
                self._open.settled(one.key, keep=under_way)
                if not under_way:  # its launch has ended, and nothing would ever forget it again
                    continue
                self._outcomes.durable(one.key, frozenset(one.row["ranks_missing"] or ()))
                latest = self._latest.get(one.key.series)
                if (latest is None or latest.step <= one.key.step) and one.row["solver"] != SKIPPED:
                    self._latest[one.key.series] = LatestRecord(one.key.series, one.key.step, now, _gauges(one.row))
                latencies.append(max(now - one.row["captured_at"].timestamp(), 0.0))
            self._tally.written(run_id, latencies, len(batch))
            done = {one.key for one in batch}
            self._unwritten = [one for one in self._unwritten if one.key not in done]
            self._changed.notify_all()

    def _forget(self, ended: set[Launch]) -> None:
        gone = ended & self._runs.keys()
        if not gone:
            return
        for launch in gone:
            del self._runs[launch]
            del self._owned[launch]
        for series in [one for one in self._latest if (one.run_id, one.attempt) in gone]:
            del self._latest[series]
        self._outcomes.forget(gone)
        ended_runs = {run for run, _ in gone} - {run for run, _ in self._runs}
        self._tally.forget(ended_runs)
        self._pressure.forget(ended_runs)
        self._latest_only -= gone
        self._judge.forget(gone)
        self._open.forget(gone)


def _mergeable(arrived: Arrived, shares: int) -> Arrived:
    """What arrived as it is merged, in memory of its own: rows stay rows where, if every share has as many, all
    together are fewer than D, and else become a scatter."""
    if not isinstance(arrived, PartialSamples):
        return arrived
    if arrived.tokens * shares < arrived.width:
        return dataclasses.replace(arrived, samples=arrived.samples.copy())
    return covariance_of(arrived)


def _gauges(record: dict[str, Any]) -> dict[str, float]:
    names = (*METRIC_NAMES, *(metric.name for metric in DATA_QUALITY))
    return {name: float(record[name]) for name in names if record[name] is not None}
