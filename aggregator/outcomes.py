"""Outcomes: what became of the records that a shard is done with, so that a partial which is pushed again is known.

A record is done with when it is durable, of all its ranks or of some, or when it was given up and counted. The shard
guards this; what it remembers is bounded, the oldest goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Set

from ..schemas import RecordKey
from ..schemas.delivery import Fate
from .snapshot import Launch

REMEMBERED_RECORDS = 200_000


class Outcomes:
    """By record."""

    def __init__(self) -> None:
        self._missing: OrderedDict[RecordKey, frozenset[int]] = OrderedDict()
        """Ranks that each record lacks."""
        self._given_up: OrderedDict[RecordKey, set[int]] = OrderedDict()
        """Ranks whose partials were dropped after they had been merged."""

    def __contains__(self, key: object) -> bool:
        return key in self._missing

    @property
    def given_up(self) -> int:
        """How many partials were dropped after they had been merged, of late."""
        return sum(map(len, self._given_up.values()))

    def missing(self, key: RecordKey) -> frozenset[int] | None:
        """The ranks that a record lacks; None where it is not done with."""
        return self._missing.get(key)

    def fate(self, key: RecordKey, rank: int) -> Fate | None:
        """What became of a rank's partial, once its record was done with."""
        missing = self._missing.get(key)
        if missing is not None and rank not in missing:
            return "partly" if missing else "durable"
        return "dropped" if self.all_given_up(key, {rank}) else None

    def all_given_up(self, key: RecordKey, ranks: Set[int]) -> bool:
        """Whether what each of these ranks sent was dropped."""
        return ranks <= self._given_up.get(key, set())

    def recall(self, stored: Mapping[RecordKey, frozenset[int]]) -> None:
        """Learns what the store says of records, of which it may know less than is known."""
        for key, missing in stored.items():
            self._missing[key] = min(missing, self._missing.get(key, missing), key=len)
        self._bound()

    def durable(self, key: RecordKey, missing: frozenset[int]) -> None:
        """It is stored, without these ranks."""
        self._missing[key] = missing
        self._given_up.pop(key, None)  # its group was kept, and the rest of a share came after all
        self._bound()

    def lose(self, key: RecordKey, ranks: Set[int], expected: Set[int]) -> int:
        """What these ranks sent is given up; of how many it is not in a record that is stored."""
        missing = self._missing.setdefault(key, frozenset(expected))
        self._given_up.setdefault(key, set()).update(ranks & missing)
        self._bound()
        return len(ranks & missing)

    def forget(self, launches: Set[Launch]) -> None:
        for remembered in (self._missing, self._given_up):
            for key in [one for one in remembered if (one.run_id, one.attempt) in launches]:
                del remembered[key]

    def _bound(self) -> None:
        for remembered in (self._missing, self._given_up):
            while len(remembered) > REMEMBERED_RECORDS:
                remembered.popitem(last=False)
