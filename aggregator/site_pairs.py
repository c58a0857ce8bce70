"""Pairs of records: both sites of one layer at one step, whose divergence neither record has alone.

Only where a run observes both sites. The divergence stands in both rows, so that whoever looks at a layer finds it at
either site. The record that is solved first waits here for the other, unwritten and so not durable, but no longer
than the deadline that a record waits for its ranks. The shard's worker thread owns it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..schemas import RecordKey
from ..spectrum import js_divergence
from .solved_record import SolvedRecord


def sibling_of(key: RecordKey) -> RecordKey:
    """The record of the layer's other site at the same step."""
    return key._replace(site="pre" if key.site == "post" else "post")


class _Waiting(NamedTuple):
    solved: SolvedRecord
    deadline: float


class SitePairs:
    """Solved records that wait for their siblings."""

    def __init__(self, deadline_seconds: float) -> None:
        self._deadline_seconds = deadline_seconds
        self._waiting: dict[RecordKey, _Waiting] = {}

    def join(self, solved: SolvedRecord, sibling_comes: bool, now: float) -> list[SolvedRecord]:
        """Takes a solved record; returns what need not wait any longer: nothing, it alone, or both of a pair.

        Args:
            solved: the record.
            sibling_comes: whether its sibling is still to be solved, or may be.
            now: on any clock, the same for all calls.
        """
        first = self._waiting.pop(sibling_of(solved.key), None)
        if first is not None:
            return _with_divergence(first.solved, solved)
        if not sibling_comes:
            return [solved]
        self._waiting[solved.key] = _Waiting(solved, now + self._deadline_seconds)
        return []

    def give_up(self, key: RecordKey) -> list[SolvedRecord]:
        """The record of this key will not be solved; returns its sibling if that waited for it."""
        first = self._waiting.pop(sibling_of(key), None)
        return [] if first is None else [first.solved]

    def overdue(self, now: float, everything: bool = False) -> list[SolvedRecord]:
        """Those that have waited long enough, or all."""
        due = [key for key, waiting in self._waiting.items() if everything or now >= waiting.deadline]
        return [self._waiting.pop(key).solved for key in due]


def _with_divergence(*pair: SolvedRecord) -> list[SolvedRecord]:
    first, second = (one.eigenvalues for one in pair)
    if first is None or second is None or first.shape != second.shape:
        return list(pair)
    # Of the spectra as they are stored, so that it can be computed again.
    divergence = float(js_divergence(torch.from_numpy(first), torch.from_numpy(second)))
    return [one._replace(row=one.row | {"js_divergence": divergence}) for one in pair]
