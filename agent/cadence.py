"""The stretch of the cadence, which all ranks change at the same step or not at all.

Ranks of a tensor-parallel group meet inside a sampled forward: one that did not know of a change would leave the
others waiting for ever. So a change is proposed for a step some seconds ahead, through the key-value store of the job's
process group, and each rank that learns of it in time consents. The verdict is a key that is written once: "yes" by the
proposing rank when all have consented, or "no" by the first rank that comes to the step before that. Whoever tries to
write it obeys what stands there, so nobody waits for anybody. Outbox threads carry the words about once a second; the
training thread asks the store only where it comes to the step of a proposal whose verdict it has not heard.
"""

from __future__ import annotations

import json
import logging
import threading
from typing import Any, NamedTuple

from torch.distributed import distributed_c10d

from .ranks import Ranks

log = logging.getLogger("eigenwatch.agent")

LEAD_SECONDS = 5.0
"""How far ahead a change is proposed at first."""
MAX_PATIENCE = 64
_YES, _NO = "yes", "no"


class Change(NamedTuple):
    """From `from_step` on the cadence is stretched by `stretch`."""

    from_step: int
    stretch: int


class _Proposal(NamedTuple):
    number: int
    change: Change


class Cadence:
    """The stretch in force. `propose`, `settle` and `stretch_at` on the training thread, `exchange` on the outbox's."""

    def __init__(self, ranks: Ranks, launch_id: str, decider: int) -> None:
        """`decider`: the rank that proposes."""
        self._others = ranks.world_size - 1
        self.decides = ranks.rank == decider
        self._changes: tuple[Change, ...] = (Change(0, 1),)
        """In force for the step under way, and after it."""
        self._proposal: _Proposal | None = None
        self._written = False
        """Whether others may have seen the proposal."""
        self._number = 0
        """Of the newest proposal that was made or read."""
        self._reached = -1
        """The furthest step for which this rank has settled."""
        self._patience = 1
        self._lock = threading.RLock()
        """Held for a few statements, never while the store is asked."""
        self._store: Any = None
        if self._others:
            store = distributed_c10d._get_default_store()
            self._store = distributed_c10d.PrefixStore(f"eigenwatch/{launch_id}", store)

    def stretch_at(self, step: int) -> int:
        return next((one.stretch for one in reversed(self._changes) if one.from_step <= step), 1)

    @property
    def newest(self) -> Change:
        """The last change that all agreed on."""
        return self._changes[-1]

    @property
    def is_open(self) -> bool:
        """Whether a proposal waits for its verdict."""
        return self._proposal is not None

    def propose(self, step: int, stretch: int, step_seconds: float, stride: int = 1) -> None:
        """The deciding rank, after `step`, wants another stretch; `stride` is how much steps rise by."""
        if not self._others:
            self._changes = (*self._changes, Change(step + 1, stretch))
            return
        lead = int(LEAD_SECONDS * self._patience / max(step_seconds, 1e-6)) + 2
        with self._lock:
            self._number += 1
            self._proposal = _Proposal(self._number, Change(step + lead * stride, stretch))
            self._written = False

    def settle(self, following: int) -> None:
        """Before `following` is begun: a proposal for it is in force afterwards, or is none any more."""
        with self._lock:
            while len(self._changes) > 1 and self._changes[1].from_step <= self._reached:
                self._changes = self._changes[1:]
            self._reached = max(self._reached, following)
            proposal = self._proposal
            if proposal is None or self._reached < proposal.change.from_step:
                return
            if self.decides and not self._written:  # nobody has seen it
                self._number -= 1
                self._end(proposal, agreed=False)
                return
        self._end(proposal, self._verdict(proposal, _NO))

    def exchange(self) -> None:
        """Carries proposals, consents and verdicts; short, and never waits for a key."""
        if self._store is None:
            return
        if self.decides:
            self._speak()
        else:
            self._listen()

    def _speak(self) -> None:
        with self._lock:
            proposal, written = self._proposal, self._written
            self._written = True
        if proposal is None:
            return
        if not written:
            self._store.set(f"proposal/{proposal.number}", json.dumps(proposal.change))
        elif self._store.add(f"consents/{proposal.number}", 0) == self._others:
            self._end(proposal, self._verdict(proposal, _YES))

    def _listen(self) -> None:
        with self._lock:
            known, number = self._proposal, self._number + 1
        if known is not None:
            if self._store.check([f"verdict/{known.number}"]):
                self._end(known, self._verdict(known, _NO))
        elif self._store.check([f"proposal/{number}"]):
            change = Change(*json.loads(self._store.get(f"proposal/{number}")))
            with self._lock:
                self._number = number
                if self._reached >= change.from_step:  # too late: without this consent it will not hold
                    return
                self._proposal = _Proposal(number, change)
            self._store.add(f"consents/{number}", 1)

    def _verdict(self, proposal: _Proposal, mine: str) -> bool:
        """Writes the verdict, unless there is one; whether the one that stands is yes."""
        try:
            stands: bytes = self._store.compare_set(f"verdict/{proposal.number}", "", mine)
        except Exception as error:  # noqa: BLE001 - the store is gone, and with it the job
            log.warning("no verdict on the change of cadence at step %d: %s", proposal.change.from_step, error)
            return False
        return stands.decode() == _YES

    def _end(self, proposal: _Proposal, agreed: bool) -> None:
        """The verdict is known, to this thread perhaps not first."""
        with self._lock:
            if self._proposal != proposal:
                return
            if agreed:
                self._changes = (*self._changes, proposal.change)
            self._patience = 1 if agreed else min(2 * self._patience, MAX_PATIENCE)
            self._proposal = None
