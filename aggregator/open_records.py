"""The records that are being merged: one group of partials a key, until it is complete or its deadline passes.

Only values and time come in, so every rule of merging can be read here: idempotence by rank, completeness, what
happens to a rank that comes late. The shard guards it with its lock.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ..schemas import PartialCovariance, RecordKey
from ..spectrum import Group

Merged = Literal["merged", "duplicate", "busy"]
Launch = tuple[str, int]
"""(run_id, attempt)"""


class ClosedRecord(NamedTuple):
    """A group that is to be solved."""

    key: RecordKey
    group: Group
    captured_at: float
    ranks_expected: int

    @property
    def complete(self) -> bool:
        return len(self.group.ranks) == self.ranks_expected


@dataclass(slots=True)
class _Open:
    group: Group
    captured_at: float
    ranks_expected: int
    deadline: float
    waiting: bool = field(default=True)
    """False between closing and the answer that the record is durable, when the group must not change."""


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

    def merge(self, partial: PartialCovariance, ranks_expected: int, now: float) -> Merged:
        """Adds a partial to its group; the same rank twice counts once."""
        key = partial.key
        entry = self._open.get(key)
        if entry is not None and (partial.rank in entry.group.ranks or not entry.waiting):
            return "duplicate" if partial.rank in entry.group.ranks else "busy"
        if entry is None and key in self._late:
            if partial.rank in self._late[key].group.ranks:
                return "duplicate"
            entry = self._late.pop(key)
            entry.waiting, entry.deadline = True, now + self._deadline_seconds
            self._open[key] = entry
        if entry is None:
            group = Group.of(partial)
            self._forget_late(group.nbytes)
            if self._open and self._bytes + group.nbytes > self._memory_bytes:
                return "busy"
            self._bytes += group.nbytes
            deadline = now + self._deadline_seconds
            self._open[key] = _Open(group, partial.captured_at, ranks_expected, deadline)
            return "merged"
        self._bytes -= entry.group.nbytes
        entry.group.add_(partial)
        self._bytes += entry.group.nbytes
        entry.captured_at = max(entry.captured_at, partial.captured_at)
        return "merged"

    def close_due(self, now: float, everything: bool = False) -> list[ClosedRecord]:
        """Groups to solve now, oldest step first: the complete, the overdue, or all that wait."""
        due = [
            (key, entry)
            for key, entry in self._open.items()
            if entry.waiting and (everything or len(entry.group.ranks) == entry.ranks_expected or now >= entry.deadline)
        ]
        for _, entry in due:
            entry.waiting = False
        closed = [ClosedRecord(key, entry.group, entry.captured_at, entry.ranks_expected) for key, entry in due]
        return sorted(closed, key=lambda one: (one.key.step, one.key.layer))

    def settled(self, key: RecordKey, keep: bool = True) -> None:
        """A closed record is durable: its group goes, or waits for late ranks if it is incomplete and `keep`."""
        entry = self._open.pop(key)
        if keep and len(entry.group.ranks) < entry.ranks_expected:
            self._late[key] = entry
            self._forget_late(0)
        else:
            self._bytes -= entry.group.nbytes

    def forget(self, ended: set[Launch]) -> None:
        """Drops what is kept for late ranks of launches that have ended."""
        for key in [one for one in self._late if (one.run_id, one.attempt) in ended]:
            self._bytes -= self._late.pop(key).group.nbytes

    def _forget_late(self, needed: int) -> None:
        while self._late and self._bytes + needed > self._memory_bytes:
            _, entry = self._late.popitem(last=False)
            self._bytes -= entry.group.nbytes
