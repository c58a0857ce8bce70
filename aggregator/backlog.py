"""The backlog: records that are closed and not yet solved, and which of them comes next.

Only values and seconds come in. Runs take turns by the solver's time that they have used, so one that floods waits for
itself; within a run the oldest step comes first, and within a step the longest job, which bounds how long the step
takes. So the records of one series are always solved in the order of their steps, as the judge needs them. Small layers
of one step are solved together. The shard guards it with its lock.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from ..schemas import RecordKey, SeriesKey
from .open_records import ClosedRecord
from .snapshot import Launch

BATCH_WIDTH = 512
"""Layers up to this width are solved together: below it, calls cost as much as arithmetic."""
BATCH_BYTES = 64 << 20
"""Of the matrices of one batch."""

_Order = tuple[int, int, int, int, str, int]


@dataclass(slots=True)
class _Run:
    seconds: float
    """Solver time used; a run that is new, or was forgotten while idle, starts where the others are."""
    waiting: list[tuple[_Order, ClosedRecord]] = field(default_factory=list)
    """A heap."""


class Backlog:
    """Closed records by run."""

    def __init__(self) -> None:
        self._runs: dict[str, _Run] = {}

    def __len__(self) -> int:
        return sum(len(run.waiting) for run in self._runs.values())

    def add(self, closed: Iterable[ClosedRecord]) -> None:
        for one in closed:
            run = self._runs.setdefault(one.key.run_id, _Run(self._floor()))
            heapq.heappush(run.waiting, (_order(one), one))

    def next(self) -> list[ClosedRecord]:
        """Takes out what is to be solved now: records of one run, step and width; empty where nothing waits."""
        waiting = [run for run in self._runs.values() if run.waiting]
        if not waiting:
            return []
        queue = min(waiting, key=lambda run: run.seconds).waiting
        _, first = heapq.heappop(queue)
        batch = [first]
        room = BATCH_BYTES - _matrix_bytes(first)
        while queue and _together(first, queue[0][1]) and (room := room - _matrix_bytes(queue[0][1])) >= 0:
            batch.append(heapq.heappop(queue)[1])
        return batch

    def spent(self, run_id: str, seconds: float) -> None:
        """Books solver time to a run."""
        if (run := self._runs.get(run_id)) is not None:
            run.seconds += seconds
        floor = self._floor()
        # An idle run that has used no more than those that wait would start where they are anyway.
        idle = [name for name, run in self._runs.items() if not run.waiting and run.seconds <= floor]
        for name in idle:
            del self._runs[name]

    def superseded(self, launches: Container[Launch], stored: Container[RecordKey] = ()) -> list[ClosedRecord]:
        """Takes out the records of these launches for which a newer one of their series waits.

        One that is known not to be finite stays: it takes no time, and an alert hangs on it. So does one of which the
        store has an earlier revision, which a record without metrics would replace.
        """
        taken = []
        for run in self._runs.values():
            newest: dict[SeriesKey, int] = {}
            for _, one in run.waiting:
                newest[one.key.series] = max(one.key.step, newest.get(one.key.series, -1))
            old = [
                one
                for _, one in run.waiting
                if one.group.finite
                and one.key not in stored
                and one.key.step < newest[one.key.series]
                and (one.key.run_id, one.key.attempt) in launches
            ]
            if old:
                keys = {one.key for one in old}
                run.waiting = [entry for entry in run.waiting if entry[1].key not in keys]
                heapq.heapify(run.waiting)
                taken += sorted(old, key=_order)
        return taken

    def _floor(self) -> float:
        """The least time that a run which waits has used; that of everybody where none waits."""
        waiting = [run.seconds for run in self._runs.values() if run.waiting]
        return min(waiting, default=max((run.seconds for run in self._runs.values()), default=0.0))


def _order(closed: ClosedRecord) -> _Order:
    key = closed.key
    return key.attempt, key.step, -closed.job.order, key.layer, key.site, -1 if key.expert is None else key.expert


def _together(first: ClosedRecord, other: ClosedRecord) -> bool:
    same_step = (first.key.attempt, first.key.step) == (other.key.attempt, other.key.step)
    return same_step and first.group.width == other.group.width <= BATCH_WIDTH


def _matrix_bytes(closed: ClosedRecord) -> int:
    return 8 * closed.job.order**2
