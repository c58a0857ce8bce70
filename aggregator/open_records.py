"""The records that are being merged: one group of partials a key, until it is complete or its deadline passes.

Only values and time come in, so every rule of merging can be read here: idempotence by rank, completeness, what
happens to a rank that comes late. The shard guards it with its lock.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ..schemas import SCATTER, Partial, PartialSamples, RecordKey, packed_length
from ..spectrum import Group
from .snapshot import Launch
from .solver import Job

TurnedAway = Literal["duplicate", "busy"]

MIXED = "mixed"
"""The form of a record whose partials came in both."""


class ClosedRecord(NamedTuple):
    """A group that is to be solved."""

    key: RecordKey
    group: Group
    ranks_expected: int
    captured_at: float
    form: str
    sampling_steps: int | None
    overhead_ratio: float | None
    rows: tuple[PartialSamples, ...] = ()
    """Partials that are merged where the record is solved."""

    @property
    def complete(self) -> bool:
        return len(self.ranks) == self.ranks_expected

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
    ranks_expected: int
    deadline: float
    waiting: bool = True
    """False between closing and the answer that the record is durable, when the group must not change."""
    solved: bool = False
    ranks: set[int] = field(default_factory=set)
    rows: list[PartialSamples] = field(default_factory=list)
    captured_at: float = 0.0
    forms: set[str] = field(default_factory=set)
    sampling_steps: int | None = None
    overhead_ratio: float | None = None

    @property
    def complete(self) -> bool:
        return len(self.ranks) == self.ranks_expected

    @property
    def nbytes(self) -> int:
        return self.group.nbytes + sum(one.nbytes for one in self.rows)

    def add(self, partial: Partial, form: str) -> None:
        if isinstance(partial, PartialSamples):
            self.rows.append(partial)
        else:
            self.group.add_(partial)
        self.ranks.add(partial.rank)
        self.captured_at = max(self.captured_at, partial.captured_at)
        if partial.tokens:  # none look the same in either form
            self.forms.add(form)
        if partial.sampling_steps is not None:
            self.sampling_steps = max(self.sampling_steps or 0, partial.sampling_steps)
        if partial.overhead_ratio is not None:
            self.overhead_ratio = max(self.overhead_ratio or 0.0, partial.overhead_ratio)

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
        )

    def let_go(self) -> None:
        """Forgets what was merged, but not whose it was."""
        self.group, self.rows = Group(width=self.group.width), []


class OpenRecords:
    """Groups by key, bounded in bytes."""

    def __init__(self, deadline_seconds: float, memory_bytes: int) -> None:
        self._deadline_seconds = deadline_seconds
        self._memory_bytes = memory_bytes
        self._open: OrderedDict[RecordKey, _Open] = OrderedDict()
        self._late: OrderedDict[RecordKey, _Open] = OrderedDict()
        """Closed and durable but incomplete, kept while there is room in case the rest arrives."""
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, key: RecordKey) -> bool:
        return key in self._open

    def unsolved(self, key: RecordKey) -> bool:
        """Whether something of this record has come that is still to be solved."""
        entry = self._open.get(key)
        return entry is not None and not entry.solved

    def turned_away(self, key: RecordKey, rank: int, width: int) -> TurnedAway | None:
        """The answer to a partial that cannot be merged now; None where `merge` would take it."""
        entry = self._open.get(key)
        if entry is not None:
            return "duplicate" if rank in entry.ranks else None if entry.waiting else "busy"
        if key in self._late:
            return "duplicate" if rank in self._late[key].ranks else None
        held = self._bytes - sum(late.nbytes for late in self._late.values())  # those give way
        return "busy" if held and held + _group_bytes(width) > self._memory_bytes else None

    def merge(
        self, partial: Partial, ranks_expected: int, now: float, form: str = SCATTER
    ) -> TurnedAway | Literal["merged"]:
        """Adds a partial to its group; the same rank twice counts once.

        Args:
            partial: what came: a scatter, or rows that are to stay rows until they are solved.
            ranks_expected: how many ranks make the record complete.
            now: on any clock, the same for all calls.
            form: in which the partial came.

        Raises:
            ValueError: it contradicts another block of its share.
        """
        key = partial.key
        answer = self.turned_away(key, partial.rank, partial.width)
        if answer is not None:
            return answer
        entry = self._open.get(key) or self._late.get(key)
        if entry is None:
            self._forget_late(_group_bytes(partial.width))
            entry = _Open(Group(width=partial.width), ranks_expected, now + self._deadline_seconds)
        before = entry.nbytes
        entry.add(partial, form)
        self._bytes += entry.nbytes - before
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
            entry.waiting = False
        return sorted((entry.closed(key) for key, entry in due), key=lambda one: (one.key.step, one.key.layer))

    def solved(self, key: RecordKey) -> None:
        """A closed record is solved: of a complete one the ranks are enough, until it is durable."""
        entry = self._open[key]
        entry.solved = True
        if entry.complete:
            self._bytes -= entry.nbytes
            entry.let_go()

    def settled(self, key: RecordKey, keep: bool = True) -> None:
        """A closed record is durable: its group goes, or waits for late ranks if it is incomplete and `keep`."""
        entry = self._open.pop(key)
        if keep and not entry.complete:
            self._late[key] = entry
            self._forget_late(0)
        else:
            self._bytes -= entry.nbytes

    def forget(self, ended: set[Launch]) -> None:
        """Drops what is kept for late ranks of launches that have ended."""
        for key in [one for one in self._late if (one.run_id, one.attempt) in ended]:
            self._bytes -= self._late.pop(key).nbytes

    def _forget_late(self, needed: int) -> None:
        while self._late and self._bytes + needed > self._memory_bytes:
            _, entry = self._late.popitem(last=False)
            self._bytes -= entry.nbytes


def _group_bytes(width: int) -> int:
    """Of a group with one share: the triangle and a mean."""
    return 8 * (packed_length(width) + width)
