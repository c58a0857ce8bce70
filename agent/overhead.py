"""The overhead contract: what sampling costs this job, and how far the cadence must be stretched for it.

Rank 0 measures and decides, since ranks of one job wait for each other in every step, so its step is everybody's. What
it decides holds from a step that lies some seconds ahead, and goes to all ranks through the key-value store of the
job's process group, read by each rank's outbox thread. The training thread waits for nothing.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.distributed import distributed_c10d

from .ranks import Ranks

log = logging.getLogger("eigenwatch.agent")

WARM_UP_STEPS = 2
"""Steps whose time says nothing: compilation, first allocations."""
LEAD_SECONDS = 5.0
"""How long ahead a change of cadence is announced; an outbox looks about once a second."""
_KEY = "cadence"


class Change(NamedTuple):
    """From `from_step` on the cadence is stretched by `stretch`."""

    from_step: int
    stretch: int


class Cadence:
    """The stretch in force, by step. Written by whichever thread learns of a change, read by the training thread."""

    def __init__(self) -> None:
        self._changes: tuple[Change, ...] = (Change(0, 1),)

    def announce(self, change: Change) -> None:
        self._changes = (*(one for one in self._changes if one.from_step < change.from_step), change)

    def adopt(self, changes: Sequence[Change]) -> None:
        """Takes over all that another rank has announced."""
        self._changes = tuple(changes)

    def stretch_at(self, step: int) -> int:
        return max((one for one in self._changes if one.from_step <= step), key=lambda one: one.from_step).stretch

    @property
    def changes(self) -> tuple[Change, ...]:
        """All that was announced, in the order of their steps."""
        return self._changes

    @property
    def newest(self) -> Change:
        return self._changes[-1]


class Meter:
    """The time of steps, sampled and not, and the stall that a sampled one has."""

    def __init__(self, asynchronous: bool = False) -> None:
        """`asynchronous`: an accelerator works on after our calls have returned."""
        self._asynchronous = asynchronous
        self._plain: deque[float] = deque(maxlen=50)
        self._sampled: deque[float] = deque(maxlen=9)
        self._timed: deque[float] = deque(maxlen=9)
        self._seen = 0

    def ended(self, seconds: float, sampled: bool, timed_seconds: float) -> None:
        """A step ended: its time, and how much of it was measured inside our own calls."""
        self._seen += 1
        if self._seen <= WARM_UP_STEPS:
            return
        if sampled:
            self._sampled.append(seconds)
            self._timed.append(timed_seconds)
        else:
            self._plain.append(seconds)

    @property
    def step_seconds(self) -> float | None:
        """Of a step that is not sampled, the median."""
        if self._plain:
            return statistics.median(self._plain)
        if self._sampled:
            pairs = zip(self._sampled, self._timed, strict=True)
            return max(statistics.median(whole - own for whole, own in pairs), 1e-9)
        return None

    @property
    def stall_seconds(self) -> float | None:
        """What sampling adds to a step: as timed in our calls, or, where an accelerator works on after these, by the
        difference of step times if that is more. None before there is a sample.
        """
        if not self._timed:
            return None
        timed = statistics.median(self._timed)
        if not self._asynchronous or len(self._plain) < 5 or len(self._sampled) < 3:
            return timed
        return max(timed, statistics.median(self._sampled) - statistics.median(self._plain))

    def ratio(self, steps: int) -> float | None:
        """The stall spread over `steps` steps, as a share of their time."""
        stall, step = self.stall_seconds, self.step_seconds
        return None if stall is None or step is None else stall / (steps * step)


def wanted_stretch(meter: Meter, every: int, max_overhead: float, stretch: int) -> int:
    """The stretch under which the contract is kept: a power of two, so that cadences nest.

    It rises at once, and falls only where half of it would cost half of what is allowed, so that it does not swing.
    """
    ratio = meter.ratio(every)
    if ratio is None:
        return stretch
    needed = 1 << max(math.ceil(math.log2(max(ratio / max_overhead, 1.0))), 0)
    if needed > stretch:
        return needed
    while stretch > 1 and ratio / (stretch // 2) <= max_overhead / 2:
        stretch //= 2
    return stretch


class Bulletin:
    """How all ranks learn what rank 0 decided. `post` on the training thread, `exchange` on the outbox's."""

    def __init__(self, ranks: Ranks, launch_id: str, cadence: Cadence) -> None:
        self._cadence = cadence
        self._is_first = ranks.rank == 0
        self._written = cadence.changes
        self._store: Any = None
        if ranks.world_size > 1:
            store = distributed_c10d._get_default_store()
            self._store = distributed_c10d.PrefixStore(f"eigenwatch/{launch_id}", store)

    def post(self, change: Change) -> None:
        """On rank 0: makes a change known, to this rank at once."""
        self._cadence.announce(change)

    def exchange(self) -> None:
        """Writes what was posted, or reads what rank 0 wrote; short, and never waits for a key.

        All changes travel together: one that followed within a second would else hide the one before.
        """
        if self._store is None:
            return
        if self._is_first:
            changes = self._cadence.changes
            if changes != self._written:
                self._store.set(_KEY, json.dumps(changes))
                self._written = changes
        elif self._store.check([_KEY]):
            self._cadence.adopt([Change(*one) for one in json.loads(self._store.get(_KEY))])
