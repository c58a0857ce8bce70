"""The stretch of the cadence, which all ranks change at the same step or not at all.

Ranks of a tensor-parallel group meet inside a sampled forward: one that did not know of a change would leave the
others waiting for ever. So a change is proposed for a step some seconds ahead, through the key-value store of the job's
process group; each rank that learns of it in time says so; and if all did before that step, the change holds, else it
is withdrawn and proposed again with more time. Outbox threads carry the words about once a second. The training thread
asks the store itself only where it comes to the step of a proposal whose verdict it has not heard, and then waits for
no more than the deciding rank's own end of that step.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from datetime import timedelta
from typing import Any, NamedTuple

from torch.distributed import distributed_c10d

from .ranks import Ranks

log = logging.getLogger("eigenwatch.agent")

LEAD_SECONDS = 5.0
"""How far ahead a change is proposed at first."""
MAX_PATIENCE = 64
VERDICT_SECONDS = 300.0
"""After so long the deciding rank is dead, and with it the job."""


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
        """Whether others can see the proposal."""
        self._number = 0
        """Of the newest proposal that was made or read."""
        self._reached = -1
        """The step for which this rank has last settled."""
        self._patience = 1
        self._lock = threading.Lock()
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
        lead = int(LEAD_SECONDS * self._patience / step_seconds) + 2
        with self._lock:
            self._number += 1
            self._proposal = _Proposal(self._number, Change(step + lead * stride, stretch))
            self._written = False

    def settle(self, following: int) -> None:
        """Before `following` is begun: a proposal for it is in force afterwards, or is none any more."""
        with self._lock:
            while len(self._changes) > 1 and self._changes[1].from_step <= self._reached:
                self._changes = self._changes[1:]
            self._reached = following
            proposal = self._proposal
            if proposal is None or following < proposal.change.from_step:
                return
            if self.decides:
                self._withdraw(proposal)
                return
        key = f"verdict/{proposal.number}"
        try:
            self._store.wait([key], timedelta(seconds=VERDICT_SECONDS))
            verdict = self._store.get(key) == b"yes"
        except Exception as error:  # noqa: BLE001 - the training process never sees an error of ours
            log.warning("no verdict on the change of cadence at step %d: %s", proposal.change.from_step, error)
            verdict = False
        with self._lock:
            if self._proposal == proposal:
                self._end(verdict)

    def exchange(self) -> None:
        """Carries proposals, consents and verdicts; short, and never waits for a key."""
        if self._store is None:
            return
        if self.decides:
            self._count_consents()
        else:
            self._listen()

    def close(self) -> None:
        """Nobody shall wait for the verdict of a rank that has ended."""
        with self._lock:
            if self.decides and self._proposal is not None:
                self._withdraw(self._proposal)

    def _count_consents(self) -> None:
        with self._lock:  # the training thread must not withdraw what is being agreed on
            if self._proposal is None:
                return
            number = self._proposal.number
            if not self._written:
                self._store.set(f"proposal/{number}", json.dumps(self._proposal.change))
                self._written = True
            elif self._store.add(f"consents/{number}", 0) == self._others:
                self._store.set(f"verdict/{number}", "yes")
                self._end(True)

    def _listen(self) -> None:
        with self._lock:
            known = self._proposal
        if known is None:
            number = self._number + 1
            if self._store.check([f"proposal/{number}"]):
                change = Change(*json.loads(self._store.get(f"proposal/{number}")))
                with self._lock:
                    self._number = number
                    if self._reached >= change.from_step:  # too late: without this consent it will not hold
                        return
                    self._proposal = _Proposal(number, change)
                self._store.add(f"consents/{number}", 1)
        elif self._store.check([f"verdict/{known.number}"]):
            verdict = self._store.get(f"verdict/{known.number}") == b"yes"
            with self._lock:
                if self._proposal == known:
                    self._end(verdict)

    def _withdraw(self, proposal: _Proposal) -> None:
        """With the lock held, on the deciding rank."""
        if self._written:
            with contextlib.suppress(Exception):  # the store is gone, and with it the job
                self._store.set(f"verdict/{proposal.number}", "no")
        else:
            self._number -= 1  # nobody has seen it
        self._end(False)

    def _end(self, agreed: bool) -> None:
        """With the lock held: the verdict is known."""
        assert self._proposal is not None
        if agreed:
            self._changes = (*self._changes, self._proposal.change)
        self._patience = 1 if agreed else min(2 * self._patience, MAX_PATIENCE)
        self._proposal = None
