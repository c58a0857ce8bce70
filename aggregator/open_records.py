"""The records that are being merged: one group of partials a key, until it is complete or its deadline passes.

Only values and time come in, so every rule of merging can be read here: idempotence by rank, completeness, what
happens to a rank that comes late. The shard guards it with its lock.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ..schemas import MIXED, SCATTER, Arrived, PartialCovariance, PartialSamples, RecordKey, packed_length
from ..spectrum import Group
from .snapshot import Launch
from .solver import Job

SPECTRUM_NUMBER_BYTES = 4
CROWDED_SECONDS = 5.0
"""Without a refusal for so long, a run no longer waits for room."""
TurnedAway = Literal["duplicate", "overlap", "busy"]


class ClosedRecord(NamedTuple):
    """A group that is to be solved."""

    key: RecordKey
    group: Group
    ranks_expected: Sequence[int]
    captured_at: float
    form: str
    sampling_steps: int | None
    overhead_ratio: float | None
    rows: tuple[PartialSamples, ...] = ()
    """Partials that are merged where the record is solved."""
    fold: Callable[[], None] = lambda: None
    """To be called before numbers are asked of `group`."""

    @property
    def missing(self) -> frozenset[int]:
        """Ranks that are not in the record: nothing has come of them, or only blocks of a share that lacks others."""
        whole = frozenset(rank for share in self.group.finished for rank in share.rows)
        there = whole | {one.rank for one in self.rows} if self.group.finite else self.ranks
        return frozenset(self.ranks_expected) - there

    @property
    def complete(self) -> bool:
        return not self.missing

    @property
    def ranks(self) -> frozenset[int]:
        """All ranks of which something has come."""
        return self.group.ranks | {one.rank for one in self.rows}

    @property
    def job(self) -> Job:
        """What the solver needs of it."""
        return Job(self.key, self.group, self.rows)


@dataclass(slots=True)
class _Open:
    group: Group
    ranks_expected: Sequence[int]
    deadline: float
    waiting: bool = True
    """False between closing and the answer that the record is durable, when the group must not change."""
    solved: bool = False
    closed_at: float = 0.0
    ranks: set[int] = field(default_factory=set)
    rows: list[PartialSamples] = field(default_factory=list)
    captured_at: float = 0.0
    forms: set[str] = field(default_factory=set)
    sampling_steps: int | None = None
    overhead_ratio: float | None = None
    nbytes: int = 0
    folding: threading.Lock = field(default_factory=threading.Lock)

    @property
    def complete(self) -> bool:
        return len(self.ranks) == len(self.ranks_expected)

    def add(self, arrived: Arrived, form: str) -> None:
        if isinstance(arrived, PartialSamples):
            self.rows.append(arrived)
        else:
            self.group.take_(arrived)
        self.ranks |= arrived.ranks
        self.captured_at = max(self.captured_at, arrived.captured_at)
        if arrived.tokens:  # none look the same in either form
            self.forms.add(form)
        if arrived.sampling_steps is not None:
            self.sampling_steps = max(self.sampling_steps or 0, arrived.sampling_steps)
        if arrived.overhead_ratio is not None:
            self.overhead_ratio = max(self.overhead_ratio or 0.0, arrived.overhead_ratio)
        self.nbytes = self.group.nbytes + sum(one.nbytes for one in self.rows)

    def closed(self, key: RecordKey) -> ClosedRecord:
        return ClosedRecord(
            key,
            self.group,
            self.ranks_expected,
            self.captured_at,
            MIXED if len(self.forms) > 1 else next(iter(self.forms), SCATTER),
            self.sampling_steps,
            self.overhead_ratio,
            tuple(self.rows),
            self.fold,
        )

    def fold(self) -> None:
        """Adds up what was merged, in whichever of the threads that wait for it comes first."""
        with self.folding:
            self.group.fold_()

    def let_go(self) -> None:
        """It is solved, and its spectrum waits to be written: what was merged into a complete one is done with."""
        self.solved = True
        if self.complete:
            self.group, self.rows, self.nbytes = Group(width=self.group.width), [], 0
        self.nbytes += SPECTRUM_NUMBER_BYTES * self.group.width


class _Crowded(NamedTuple):
    """A run was told again and again that there is no room."""

    since: float
    until: float


class OpenRecords:
    """Groups by key, bounded in bytes."""

    def __init__(self, deadline_seconds: float, memory_bytes: int) -> None:
        self._deadline_seconds = deadline_seconds
        self._memory_bytes = memory_bytes
        self._open: OrderedDict[RecordKey, _Open] = OrderedDict()
        self._late: OrderedDict[RecordKey, _Open] = OrderedDict()
        """Closed and durable but incomplete, kept while there is room in case the rest arrives."""
        self._crowded: dict[str, _Crowded] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, key: RecordKey) -> bool:
        return key in self._open

    def unsolved(self, key: RecordKey) -> bool:
        """Whether something of this record has come that is still to be solved."""
        entry = self._open.get(key)
        return entry is not None and not entry.solved

    def folding(self, key: RecordKey) -> Callable[[], None]:
        """What adds up the numbers that were merged into an open record; it needs no lock, and takes time."""
        return self._open[key].fold

    def ranks(self, key: RecordKey) -> Set[int] | None:
        """Ranks that are merged into this record, while its group is kept; None where it is not."""
        entry = self._open.get(key) or self._late.get(key)
        return None if entry is None else entry.ranks

    def behind_seconds(self, run_id: str, now: float) -> float:
        """How long the oldest closed record of a run has waited to be solved, or the run for room; 0 where it need
        not wait."""
        waiting = (
            entry.closed_at for key, entry in self._open.items()
            if key.run_id == run_id and not entry.waiting and not entry.solved
        )  # fmt: skip
        crowded = self._crowded.get(run_id)
        since = crowded.since if crowded is not None and now - crowded.until <= CROWDED_SECONDS else now
        return now - min(since, *waiting, now)

    def turned_away(self, arrived: Arrived, now: float) -> TurnedAway | None:
        """The answer to what cannot be merged now; None where `merge` would take it."""
        key = arrived.key
        held = self.ranks(key)
        if held is not None:
            if arrived.ranks & held:
                return "duplicate" if arrived.ranks <= held else "overlap"
            if key in self._open and not self._open[key].waiting:
                return "busy"
        # A block waits beside the sum; whatever else comes to a record that is open only adds to it.
        block = isinstance(arrived, PartialCovariance) and arrived.rows != (0, arrived.width)
        needed = _group_bytes(arrived.width) if held is None else arrived.nbytes if block else 0
        if not needed or self._has_room(key, needed, now):
            return None
        crowded = self._crowded.get(key.run_id)
        fresh = crowded is None or now - crowded.until > CROWDED_SECONDS
        self._crowded[key.run_id] = _Crowded(now if fresh or crowded is None else crowded.since, now)
        return "busy"

    def merge(
        self, arrived: Arrived, ranks_expected: Sequence[int], now: float, form: str = SCATTER
    ) -> TurnedAway | Literal["merged"]:
        """Adds a partial, or a group of them, to its group; the same rank twice counts once.

        Args:
            arrived: a scatter, a group of them, or rows that are to stay rows until they are solved.
            ranks_expected: the ranks that make the record complete.
            now: on any clock, the same for all calls.
            form: in which it came.

        Raises:
            ValueError: it contradicts another block of its share.
        """
        key = arrived.key
        answer = self.turned_away(arrived, now)
        if answer is not None:
            return answer
        entry = self._open.get(key) or self._late.get(key)
        if entry is None:
            self._forget_late(_group_bytes(arrived.width))
            entry = _Open(Group(width=arrived.width), ranks_expected, now + self._deadline_seconds)
        entry.add(arrived, form)
        if self._late.pop(key, None) is not None:
            entry.waiting, entry.solved, entry.deadline = True, False, now + self._deadline_seconds
        self._open[key] = entry
        return "merged"

    def close_due(self, now: float, everything: bool = False) -> list[ClosedRecord]:
        """Groups to solve now, oldest step first: the complete, the overdue, or all that wait."""
        due = [
            (key, entry)
            for key, entry in self._open.items()
            if entry.waiting and (everything or entry.complete or now >= entry.deadline)
        ]
        for _, entry in due:
            entry.waiting, entry.closed_at = False, now
        return sorted((entry.closed(key) for key, entry in due), key=lambda one: (one.key.step, one.key.layer))

    def solved(self, key: RecordKey) -> None:
        """A closed record is solved: of a complete one ranks and spectrum are enough, until it is durable."""
        self._open[key].let_go()

    def settled(self, key: RecordKey, keep: bool = True) -> None:
        """A closed record is durable: its group goes, or waits for late ranks if it is incomplete and `keep`."""
        entry = self._open.pop(key)
        if keep and not entry.complete:
            entry.nbytes -= SPECTRUM_NUMBER_BYTES * entry.group.width if entry.solved else 0
            self._late[key] = entry
            self._forget_late(0)

    def forget(self, ended: set[Launch]) -> None:
        """Drops what is kept for late ranks of launches that have ended."""
        for run_id in {run for run, _ in ended}:
            self._crowded.pop(run_id, None)
        for key in [one for one in self._late if (one.run_id, one.attempt) in ended]:
            del self._late[key]

    def hand_over(self, launch: Launch, layers: Set[int]) -> None:
        """Drops what another shard will be given again: what waits for ranks, before it is closed or afterwards."""
        for entries in (self._open, self._late):
            for key, entry in list(entries.items()):
                if (key.run_id, key.attempt) == launch and key.layer in layers and (entry.waiting or key in self._late):
                    del entries[key]

    @property
    def held_bytes(self) -> int:
        """Of all that is merged or waits to be written, and of what is kept for late ranks."""
        return sum(entry.nbytes for entries in (self._open, self._late) for entry in entries.values())

    def _has_room(self, key: RecordKey, needed: int, now: float) -> bool:
        """Whether so much more may be held. Where several runs have open records, or ask for room, each has an equal
        part, so that none waits for the memory that another floods. What is kept for late ranks gives way."""
        held: Counter[str] = Counter()
        for other, entry in self._open.items():
            held[other.run_id] += entry.nbytes
        others = (entry for other, entry in self._open.items() if other != key)
        if held.total() <= self._memory_bytes and all(entry.solved for entry in others):
            return True  # one is merged however little there is, a sibling for which a solved one waits too
        asking = {run for run, crowded in self._crowded.items() if now - crowded.until <= CROWDED_SECONDS}
        part = self._memory_bytes // len(held.keys() | asking | {key.run_id})
        its_own = not held[key.run_id] or held[key.run_id] + needed <= part
        return its_own and held.total() + needed <= self._memory_bytes

    def _forget_late(self, needed: int) -> None:
        held = self.held_bytes
        while self._late and held + needed > self._memory_bytes:
            _, entry = self._late.popitem(last=False)
            held -= entry.nbytes


def _group_bytes(width: int) -> int:
    """Of a group with one share: the triangle and a mean."""
    return 8 * (packed_length(width) + width)
